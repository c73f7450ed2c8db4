"""Forwards on lengths that nothing has seen before: every pass repeats its lengths, a server never does.

A schedule that is kept per tuple of lengths, or a kernel that is compiled for one, costs nothing in a pass.
Here it does. Each new tuple is run once, and then again: the forwards differ in nothing but having been seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch

from mla.bench.doubts.clock import now_ns
from mla.bench.results.schema import NewLengths
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.cache.ragged_batch import BatchMemory, RaggedBatch
from mla.cost import PathChooser
from mla.errors import UnsupportedBatch
from mla.layer.plan import check_lengths
from mla_backends import BackendError

# New tuples of lengths; how often each is run again; and the seconds after which no further one is begun.
TUPLES, AGAIN, SECONDS = 6, 2, 2.0
# A length shrinks by at most a part, so that the work stays much the same, or by so many tokens.
PART, TOKENS = 8, 16
# Draws after which there are no new tuples to be had.
DRAWS = 20

_random = random.SystemRandom()  # otherwise two implementations of one run would see the same
_seen: set[Lengths] = set()


class Lengths(NamedTuple):
    """The lengths of a batch, per request."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


@dataclass
class Times:
    """Milliseconds of forwards, and of planning alone."""

    forward: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)


def measure(
    one: MlaLayer,
    scenario: Scenario,
    now: Callable[[], int] = now_ns,
    heartbeat: Callable[[], None] = lambda: None,
) -> NewLengths | None:
    """Time forwards of a loaded layer on new lengths; None if the scenario leaves no room for any.

    `now` returns nanoseconds; `heartbeat` is called after every forward. Lengths are at most those of the
    scenario, so that no memory grows. The history is left as it was.
    """
    new, again = Times(), Times()
    bench, start = _Bench(one, scenario, now), now()
    for lengths in new_lengths(one, scenario):
        saved = bench.save(lengths)
        try:
            for times in (new, *[again] * AGAIN):
                bench.run(lengths, times)
                heartbeat()
        except (UnsupportedBatch, BackendError):  # such lengths are refused, as late as it may be
            continue
        finally:
            bench.put_back(saved)
        if now() - start > 1e9 * SECONDS:
            break
    one.restore()
    if not new.forward:
        return None
    medians = (
        median(times) / scenario.layers for times in (new.forward, again.forward, new.plan, again.plan)
    )
    ms, repeated_ms, plan_ms, repeated_plan_ms = medians
    return NewLengths(
        forwards=len(new.forward),
        ms=ms,
        repeated_ms=repeated_ms,
        plan_ms=plan_ms,
        repeated_plan_ms=repeated_plan_ms,
    )


def new_lengths(one: MlaLayer, scenario: Scenario) -> Iterator[Lengths]:
    """Yield tuples of lengths that this process has not run, and that take the paths of the scenario's."""
    shrinking = [_amounts(*pair) for pair in zip(scenario.query_lens, scenario.history, strict=True)]
    planned = Lengths(scenario.query_lens, scenario.kv_lens(0))
    paths = _paths(one, planned)
    for _ in range(TUPLES):
        for _ in range(DRAWS):
            shrunk = _shrunk(scenario, [next(amounts) for amounts in shrinking])
            known = shrunk == planned or shrunk in _seen
            if not known and _paths(one, shrunk) == paths and _served(one, shrunk):
                _seen.add(shrunk)
                yield shrunk
                break


def _amounts(new: int, history: int) -> Iterator[int]:
    """Yield by how much to shrink one request, each amount once before one comes again; 0 if by nothing."""
    length = history or new
    room = min(length if history else length - 1, max(TOKENS, length // PART))
    amounts = list(range(1, room + 1)) or [0]
    while True:
        _random.shuffle(amounts)
        yield from amounts


def _shrunk(scenario: Scenario, amounts: Sequence[int]) -> Lengths:
    """Return the scenario's lengths with less history, or fewer new tokens in a request that has none."""
    requests = list(zip(scenario.query_lens, scenario.history, amounts, strict=True))
    decode = scenario.mode == "decode"
    query_lens = tuple(new if past or decode else new - less for new, past, less in requests)
    kept = (past - less if past else 0 for _, past, less in requests)
    return Lengths(query_lens, tuple(past + new for past, new in zip(kept, query_lens, strict=True)))


def _paths(one: MlaLayer, lengths: Lengths) -> list[str]:
    if one.setting.attention != "auto":
        return []
    chooser = PathChooser(one.setting.config)
    return [chooser.path(*pair) for pair in zip(*lengths, strict=True)]


def _served(one: MlaLayer, lengths: Lengths) -> bool:
    """Return whether the ops accept these lengths."""
    setting = one.setting
    try:
        check_lengths(setting.config, one.layer.ops, *lengths, setting.page_size, setting.attention)
    except UnsupportedBatch:
        return False
    return True


class _Bench:
    """Runs batches of any lengths over the pages of a loaded layer, without changing what is cached."""

    def __init__(self, one: MlaLayer, scenario: Scenario, now: Callable[[], int]) -> None:
        self._one, self._now = one, now
        one.restore()
        one.before(0)
        full = one.batch if scenario.mode == "prefill" else one.extend()
        self._table, self._device = full.block_table_host, full.device
        self._memory = self._memory_for(full.num_tokens)

    def _memory_for(self, tokens: int) -> BatchMemory:
        return BatchMemory(tokens, self._table, self._device)

    def _batch(self, lengths: Lengths) -> RaggedBatch:
        cache = self._one.cache
        if not self._memory.fits(sum(lengths.query_lens), self._table):
            self._memory = self._memory_for(sum(lengths.query_lens))
        return RaggedBatch(
            *lengths, self._table, cache.page_size, self._device, source=cache, memory=self._memory
        )

    def save(self, lengths: Lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which slots a batch writes, and what they hold in all layers."""
        slots = self._batch(lengths).slots.clone()
        return slots, self._rows().index_select(1, slots)

    def put_back(self, saved: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write what `save` returned."""
        self._rows().index_copy_(1, *saved)

    def _rows(self) -> torch.Tensor:
        pages = self._one.cache.pages
        return pages.view(pages.shape[0], -1, pages.shape[-1])

    def run(self, lengths: Lengths, times: Times) -> None:
        """Time one forward: tables, plan and all."""
        one, synchronize, tokens = self._one, self._one.setting.backend.synchronize, sum(lengths.query_lens)
        x, out = one.x[:tokens], one.out.narrow(-2, 0, tokens)
        synchronize()
        start = self._now()
        batch = self._batch(lengths)
        planning = self._now()
        one.layer.plan(batch)
        planned = self._now()
        one.forward(batch, x, out)
        synchronize()
        times.forward.append((self._now() - start) / 1e6)
        times.plan.append((planned - planning) / 1e6)
