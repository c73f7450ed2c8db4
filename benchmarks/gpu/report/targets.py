"""What the project's own kernels are to reach on an H100, and whether a first hour has seen them do so."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.report import in_turns
from benchmarks.gpu.report.in_turns import Way, latencies, spoken
from mla.bench.results.schema import Case, Run

CARD = "H100"
OWN, OWN_LATENT = "triton_", "triton_latent"  # how names of the project's own kernels begin; one of them
LARGE_BYTES = 1_000_000_000  # an attention call that moves less is no measure of bandwidth
# Below it, a call outside a graph may last as long as the host takes to launch it.
LONG_MS = 0.1
LONG_CALL = f"{1e3 * LONG_MS:.0f} us"
HEADER = ("target", "result", "number", "of what")
NOTE = f"""\
Shares of ceilings are judged on shapes that move 1 GB or more.
Ratios to another kernel are judged where both take {LONG_CALL} or more on the device's clock:
below that, a time may be the host's. What counts is the lowest number.
"""
HOST: tuple[Way, ...] = (("graph", False), ("eager", False))
DEVICE: tuple[Way, ...] = (("graph", True), ("eager", True))


@dataclass(frozen=True)
class Evidence:
    """Result files of a first hour, by step, and the card's ceilings.

    Of `layers` the first that has what is asked for counts.
    """

    layers: Mapping[str, Run] = field(default_factory=dict)
    rivals: Mapping[str, Run] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)


class Seen(NamedTuple):
    """What one case shows of a target: it is met from a margin of 1 on, and open with none."""

    margin: float | None
    number: str
    of: str


class Target(NamedTuple):
    """What is to be reached, and how results show it: by the least of what `look` yields."""

    text: str
    look: Callable[[Evidence], Iterator[Seen]]


def rows(evidence: Evidence, card: str) -> list[list[str]]:
    """Return a row per target under `HEADER`. On another card than an H100 the result says so."""
    elsewhere = "" if CARD in card else f" (no {CARD})"
    return [_row(target.text, list(target.look(evidence)), elsewhere) for target in TARGETS]


def _row(text: str, seen: Sequence[Seen], elsewhere: str) -> list[str]:
    margins = [each.margin for each in seen if each.margin is not None]
    least = next((each for each in seen if margins and each.margin == min(margins)), None)
    open_case = next((each for each in seen if each.margin is None), None)
    if least is None or (open_case and least.margin):
        return [text, "not run", "-", open_case.of if open_case else "no such result"]
    of = f"{least.of}, the lowest of {len(seen)}" if len(seen) > 1 else least.of
    return [text, ("met" if min(margins) >= 1 else "not met") + elsewhere, least.number, of]


def note(card: str) -> str:
    """Return the line below the table."""
    other = "" if CARD in card else f"; this is {card}, and says nothing about one"
    return f"Targets are for an {CARD} and the project's own kernels{other}. {NOTE}"


Judge = Callable[[Case, float], tuple[float, str]]  # case, mean ms of a forward -> margin and number


def layer(config: str, mode: str, ways: Sequence[Way], judge: Judge) -> Callable[[Evidence], Iterator[Seen]]:
    """Return a look at the layer in a standard scenario with the project's own attention.

    `ways` of timing: the first that is there counts.
    """
    op = "latent_attention" if mode == "decode" else "expanded_attention"

    def look(evidence: Evidence) -> Iterator[Seen]:
        for run in evidence.layers.values():
            for case in run.cases if Path(str(run.config.get("name", ""))).name == config else ():
                if case.op is None and case.mode == mode and case.ops.get(op, "").startswith(OWN):
                    for way in (way for way in ways if way in latencies(case)):
                        margin, number = judge(case, statistics.fmean(latencies(case)[way].samples))
                        yield Seen(margin, number, f"{case.scenario}, {case.implementation}: {spoken(way)}")
                        return

    return look


def tokens_per_second(least: float) -> Judge:
    """Return a judge of new tokens per second."""

    def judge(case: Case, ms: float) -> tuple[float, str]:
        rate = sum(case.query_lens) / ms * 1e3
        return rate / least, f"{rate:.4g} tok/s"

    return judge


def milliseconds(most: float) -> Judge:
    """Return a judge of milliseconds per forward."""
    return lambda case, ms: (most / ms, f"{ms:.3g} ms")


def share(
    heads: int, ceiling: str, work: Callable[[Case], int], least: float
) -> Callable[[Evidence], Iterator[Seen]]:
    """Return a look at decode attention of one head count: its share of a ceiling over large shapes."""

    def look(evidence: Evidence) -> Iterator[Seen]:
        for case in own_decodes(evidence) if evidence.ceilings.get(ceiling) else ():
            if case.heads != heads or case.cost.bytes < LARGE_BYTES:
                continue
            if best := in_turns.best_way(case):
                reached = work(case) / best[1] * 1e3 / evidence.ceilings[ceiling]
                yield Seen(reached / least, f"{reached:.0%}", case.scenario)
            else:
                status = case.check.status
                said = f"{case.scenario}: {status} {case.check.reason}"
                yield Seen(0.0 if status == "wrong" else None, status, said)

    return look


def against(op: str, least: float) -> Callable[[Evidence], Iterator[Seen]]:
    """Return a look at the ratio to another kernel on every shape that took both long on its clock."""

    def look(evidence: Evidence) -> Iterator[Seen]:
        for together in in_turns.by_shape(_decodes(evidence)):
            for ours in in_turns.named(together, OWN_LATENT):
                for other in in_turns.named(together, op):
                    ratio = in_turns.ratio(ours, other, DEVICE, LONG_MS)
                    if ratio is not None:
                        yield Seen(ratio / least, f"{ratio:.2f}x", ours.scenario)

    return look


def _decodes(evidence: Evidence) -> dict[str, Run]:
    return {step: run for step, run in evidence.rivals.items() if not step.startswith("rivals-expanded")}


def own_decodes(evidence: Evidence) -> list[Case]:
    """Return absorbed attention alone, by the project's own kernel."""
    shapes = in_turns.by_shape(_decodes(evidence))
    return [case for together in shapes for case in in_turns.named(together, OWN_LATENT)]


TARGETS = (
    Target(
        "deepseek-v2-lite, decode: at least 100,000 tok/s in a graph, host clock",
        layer("deepseek-v2-lite", "decode", HOST[:1], tokens_per_second(100_000)),
    ),
    Target(
        "deepseek-v2-lite, prefill: at most 0.3 ms, host clock",
        layer("deepseek-v2-lite", "prefill", HOST, milliseconds(0.3)),
    ),
    Target(
        "deepseek-r1, decode: at most 0.2 ms for a step of 16, device clock",
        layer("deepseek-r1", "decode", DEVICE, milliseconds(0.2)),
    ),
    Target(
        "decode attention, 16 heads: at least 85 % of copy bandwidth",
        share(16, in_turns.COPY, lambda case: case.cost.bytes, 0.85),
    ),
    Target(
        "decode attention, 128 heads: at least 65 % of the 8192^3 product",
        share(128, in_turns.PRODUCT, lambda case: case.cost.flops, 0.65),
    ),
    Target(
        f"decode attention of {LONG_CALL} or more: at least 0.9 times as fast as FlashMLA, device clock",
        against("flash_mla", 0.9),
    ),
    Target(
        f"decode attention of {LONG_CALL} or more: at least 0.85 times as fast as FlashInfer, device clock",
        against(in_turns.FLASHINFER, 0.85),
    ),
)
