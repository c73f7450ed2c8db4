"""Times the cases of a comparison and judges their results."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.peers.ggml import attention, products, record
from benchmarks.peers.ggml.attention import AttentionCase
from benchmarks.peers.ggml.peer import Peer
from benchmarks.peers.ggml.products import ProductCase
from benchmarks.peers.ggml.ways import Way, take_turns, try_out
from mla.bench.results import stats
from mla.bench.subjects.setting import Setting
from mla.command import console
from mla.errors import UsageError


def choose(setting: Setting, patterns: Sequence[str] | None) -> tuple[list[AttentionCase], list[ProductCase]]:
    """Return the cases whose name or op matches a pattern; None: all. Raises `UsageError` if none does."""
    heads, shapes = attention.attention_cases(), products.product_cases(setting)

    def named(*words: str) -> bool:
        return patterns is None or any(
            fnmatch.fnmatchcase(word, pattern) for pattern in patterns for word in words
        )

    found_heads = [case for case in heads if named(case.name, "attention")]
    found_shapes = [case for case in shapes if named(case.name, "product")]
    if not found_heads and not found_shapes:
        known = ", ".join([case.name for case in heads] + [case.name for case in shapes])
        raise UsageError(f"--only names no case: use attention, product, {known}, or a pattern like 16x*.")
    return found_heads, found_shapes


class Comparer:
    """Times cases; `rounds` is how often each way of a case is visited."""

    def __init__(self, setting: Setting, peer: Peer, rounds: int) -> None:
        self._setting, self._peer, self._rounds = setting, peer, rounds

    def attention(self, case: AttentionCase) -> record.Case:
        """Return one case. Its ways take turns with each other alone."""
        setting = replace(self._setting, config=self._setting.config.with_heads(case.heads))
        data = attention.AttentionData(case, setting)
        console.note(f"timing {case.name}")
        with contextlib.ExitStack() as work:
            ways = [*attention.own_ways(data), *attention.peer_ways(data, self._peer, work.callback)]
            slow = try_out(ways)
            self._take_turns([way for way in ways if way not in slow])
            return judged(case.name, "attention", data.flops, ways, data.truth(), [])

    def products(self, cases: Sequence[ProductCase]) -> list[record.Case]:
        """Return all products. They take turns together, so that a share of the best is one of its time."""
        if cases:
            console.note(f"timing {len(cases)} products")
        with contextlib.ExitStack() as work:
            drawn: list[tuple[ProductCase, list[Way], torch.Tensor, list[str]]] = []
            timed: list[Way] = []
            for case in cases:
                data, notes = products.ProductData(case, self._setting), list[str]()
                ways = products.all_ways(data, self._peer, notes, work.callback)
                slow = try_out(ways)
                timed += [way for way in ways if way not in slow]
                drawn.append((case, ways, data.truth(), notes))
            self._take_turns(timed)
            return [
                judged(case.name, "product", case.flops, ways, truth, notes)
                for case, ways, truth, notes in drawn
            ]

    def _take_turns(self, ways: Sequence[Way]) -> None:
        take_turns(ways, self._rounds, self._setting.seed)


def judged(
    name: str, op: str, flops: int, ways: Sequence[Way], truth: torch.Tensor, notes: list[str]
) -> record.Case:
    """Return a case with the medians of all ways that were visited, and the errors of their results."""
    return record.Case(
        name=name,
        op=op,  # type: ignore[arg-type]
        flops=flops,
        timings=[_timing(way, truth) for way in ways if way.visits],
        passed_over={way.name: way.trial_ms for way in ways if not way.visits},
        notes=notes,
    )


def _timing(way: Way, truth: torch.Tensor) -> record.Timing:
    error = (way.result().double() - truth).norm() / truth.norm()
    return record.Timing(
        name=way.name,
        party=way.party,  # type: ignore[arg-type]
        dtype=way.dtype,
        ms=stats.median(way.visits),
        ci95=stats.median_interval(way.visits),
        visits_ms=way.visits,
        calls=way.calls,
        error=error.item() if error.isfinite() else record.NO_RESULT,
    )
