"""What the project's own kernels are to reach on an H100, and whether a first hour has seen them do so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True)
class Finding:
    """A number and what it is of; without one, `of` says why."""

    of: str
    number: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Target:
    """What is to be reached, and how results show it."""

    text: str
    look: Callable[[Evidence], Finding]


def rows(evidence: Evidence, card: str) -> list[list[str]]:
    """Return a row per target under `HEADER`. On another card than an H100 the result says so."""
    elsewhere = "" if CARD in card else f" (no {CARD})"
    return [_row(target.text, target.look(evidence), elsewhere) for target in TARGETS]


def _row(text: str, seen: Finding, elsewhere: str) -> list[str]:
    if seen.met is None:
        return [text, "not run", "-", seen.of]
    return [text, ("met" if seen.met else "not met") + elsewhere, seen.number, seen.of]


def note(card: str) -> str:
    """Return the line below the table."""
    other = "" if CARD in card else f"; this is {card}, and says nothing about one"
    return f"Targets are for an {CARD} and the project's own kernels{other}. {NOTE}"


@dataclass(frozen=True)
class Layer:
    """The layer of a config in a standard scenario; `judge` gets the mean milliseconds of a forward."""

    config: str
    mode: str  # prefill or decode
    ways: tuple[Way, ...]  # of timing, the first that is there
    judge: Callable[[Case, float], tuple[str, bool]]

    def __call__(self, evidence: Evidence) -> Finding:
        """Look for a forward with the project's own attention."""
        op = "latent_attention" if self.mode == "decode" else "expanded_attention"
        cases = list(self._cases(evidence))
        ours = [case for case in cases if case.ops.get(op, "").startswith(OWN)]
        if not ours:
            ran = ", ".join(dict.fromkeys(case.ops.get(op, "no other path") for case in cases))
            why = f"attention was {ran}" if ran else "no result"
            return Finding(f"{self.mode} of {self.config}: {why}")
        timed = ((case, way, latencies(case).get(way)) for case in ours for way in self.ways)
        for case, way, latency in timed:
            if latency is not None:
                number, met = self.judge(case, statistics.fmean(latency.samples))
                return Finding(f"{case.scenario}, {case.implementation}: {spoken(way)}", number, met)
        return Finding(f"{ours[0].scenario}, {ours[0].implementation}: {_without_time(ours[0])}")

    def _cases(self, evidence: Evidence) -> Iterator[Case]:
        for run in evidence.layers.values():
            if Path(str(run.config.get("name", ""))).name == self.config:
                yield from (case for case in run.cases if case.op is None and case.mode == self.mode)


def _without_time(case: Case) -> str:
    return "not timed like that" if case.check.status == "ok" else f"{case.check.status} {case.check.reason}"


def tokens_per_second(least: float) -> Callable[[Case, float], tuple[str, bool]]:
    """Return a judge of new tokens per second."""

    def judge(case: Case, ms: float) -> tuple[str, bool]:
        rate = sum(case.query_lens) / ms * 1e3
        return f"{rate:.4g} tok/s", rate >= least

    return judge


def milliseconds(most: float) -> Callable[[Case, float], tuple[str, bool]]:
    """Return a judge of milliseconds per forward."""
    return lambda case, ms: (f"{ms:.3g} ms", ms <= most)


@dataclass(frozen=True)
class Share:
    """Decode attention of one head count: the least share of a ceiling over large shapes."""

    heads: int
    ceiling: str
    work: Callable[[Case], int]
    least: float

    def __call__(self, evidence: Evidence) -> Finding:
        """Look at every shape that moves `LARGE_BYTES`."""
        ceiling = evidence.ceilings.get(self.ceiling)
        if not ceiling:
            return Finding(f"no ceiling was measured: {self.ceiling}")
        cases = [case for case in own_decodes(evidence) if case.heads == self.heads]
        large = [case for case in cases if case.cost.bytes >= LARGE_BYTES]
        if not large:
            return Finding(f"no shape with {self.heads} heads that moves {LARGE_BYTES / 1e9:.0f} GB")
        rates = [(self.work(case) / ms * 1e3 / ceiling, case) for case in large if (ms := _ms(case))]
        if len(rates) < len(large):
            return _incomplete(large)
        return _judged(rates, self.least, "{:.0%}")


def against(name: str, op: str, least: float) -> Callable[[Evidence], Finding]:
    """Return a look at the ratio to another kernel on every shape that took both long on its clock."""

    def look(evidence: Evidence) -> Finding:
        ratios = [
            (in_turns.ratio(ours, other, DEVICE, LONG_MS), ours)
            for together in in_turns.by_shape(_decodes(evidence))
            for ours in in_turns.named(together, OWN_LATENT)
            for other in in_turns.named(together, op)
        ]
        both = [(ratio, case) for ratio, case in ratios if ratio is not None]
        if not both:
            return Finding(f"no shape that took it and {name} {LONG_CALL} or more on the device's clock")
        return _judged(both, least, "{:.2f}x")

    return look


def _decodes(evidence: Evidence) -> dict[str, Run]:
    return {step: run for step, run in evidence.rivals.items() if not step.startswith("rivals-expanded")}


def own_decodes(evidence: Evidence) -> list[Case]:
    """Return absorbed attention alone, by the project's own kernel."""
    return [
        case
        for together in in_turns.by_shape(_decodes(evidence))
        for case in in_turns.named(together, OWN_LATENT)
    ]


def _ms(case: Case) -> float:
    best = in_turns.best_way(case)
    return best[1] if best else 0.0


def _incomplete(cases: Sequence[Case]) -> Finding:
    missing = [case for case in cases if not _ms(case)]
    wrong = any(case.check.status == "wrong" for case in missing)
    said = f"{missing[0].scenario}: {_without_time(missing[0])}"
    return Finding(said, "wrong", False) if wrong else Finding(said)


def _judged(numbers: Sequence[tuple[float, Case]], least: float, form: str) -> Finding:
    """Judge by the least of several numbers; all must reach the target."""
    worst, case = min(numbers, key=lambda pair: pair[0])
    mean = math.exp(statistics.fmean(math.log(number) for number, _ in numbers))
    of = f"{case.scenario}, the lowest of {len(numbers)}; geometric mean {form.format(mean)}"
    return Finding(of, form.format(worst), worst >= least)


TARGETS = (
    Target(
        "deepseek-v2-lite, decode: at least 100,000 tok/s in a graph, host clock",
        Layer("deepseek-v2-lite", "decode", HOST[:1], tokens_per_second(100_000)),
    ),
    Target(
        "deepseek-v2-lite, prefill: at most 0.3 ms, host clock",
        Layer("deepseek-v2-lite", "prefill", HOST, milliseconds(0.3)),
    ),
    Target(
        "deepseek-r1, decode: at most 0.2 ms for a step of 16, device clock",
        Layer("deepseek-r1", "decode", DEVICE, milliseconds(0.2)),
    ),
    Target(
        "decode attention, 16 heads: at least 85 % of copy bandwidth",
        Share(16, in_turns.COPY, lambda case: case.cost.bytes, 0.85),
    ),
    Target(
        "decode attention, 128 heads: at least 65 % of the 8192^3 product",
        Share(128, in_turns.PRODUCT, lambda case: case.cost.flops, 0.65),
    ),
    Target(
        f"decode attention of {LONG_CALL} or more: at least 0.9 times as fast as FlashMLA, device clock",
        against("FlashMLA", "flash_mla", 0.9),
    ),
    Target(
        f"decode attention of {LONG_CALL} or more: at least 0.85 times as fast as FlashInfer, device clock",
        against("FlashInfer", in_turns.FLASHINFER, 0.85),
    ),
)
