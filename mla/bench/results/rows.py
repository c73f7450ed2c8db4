"""The one flat row of a case: what tables, CSV files and the page say of it. Needs no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mla.bench.results.cases import KINDS, by_kind, imbalance, is_predicted, repeated, unlabelled
from mla.bench.results.compare import Comparison, compare_implementations
from mla.bench.results.schema import Case, Interval, Latency, RankFacts, Run, Spread, Throughput, Timing
from mla.bench.results.stats import median
from mla.verify.verdict import Check

Cell = str | int | float | bool | None
T = TypeVar("T")

# A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# What the implementations of a scenario are compared with, if it ran: the first of these, then any other.
_BASELINES = ("mla-reference", "transformers", "transformers-eager")


@dataclass(frozen=True)
class Row:
    """A case as it was timed in one way: `timing` is None for the headline (eager, warm, host clock)."""

    run: Run
    case: Case
    timing: Timing | None = None
    path: Path | None = None
    comparison: Comparison | None = None  # of the headline with the scenario's baseline; None: it is that

    @property
    def check(self) -> Check:
        """The verdict on the row: the case's, where that withholds all numbers."""
        return self.case.check if self.timing is None or withheld(self.case) else self.timing.check

    @property
    def _has_number(self) -> bool:
        return self.check.status not in ("wrong", "doubtful")

    @property
    def latency(self) -> Latency | None:
        """The time of a forward, unless it was withheld."""
        return (self.timing or self.case).latency_ms if self._has_number else None

    @property
    def throughput(self) -> Throughput | None:
        """New tokens per second, of the headline alone."""
        return self.case.tokens_per_s if self._has_number and self.timing is None else None

    @property
    def headline(self) -> Case | None:
        """The case, where this row is its headline and has a number."""
        return self.case if self.timing is None and self.latency else None

    @property
    def spread(self) -> Spread | None:
        """How the case was spread over ranks, of the headline alone."""
        return self.case.spread if self.timing is None else None

    @property
    def share(self) -> float | None:
        """The share of the limit that the headline reaches; None where limit or time is in doubt."""
        case = self.headline
        return None if case is None or case.roofline.doubt else case.roofline.fraction

    @property
    def speedup(self) -> Comparison | None:
        """The comparison with the baseline, where it decides that one of both is faster."""
        return self.comparison if self.comparison and self.comparison.decided else None

    def per_second(self, amount: int, unit: float) -> float | None:
        """Return needed work over the median time; extra work of an implementation does not count."""
        return amount / self.latency.median * 1e3 / unit if self.latency else None

    def cold(self) -> Latency | None:
        """Return the latency with a cold cache, otherwise timed like the headline."""
        timing = by_kind(self.case).get("cold")
        return timing.latency_ms if timing and self._has_number else None


def withheld(case: Case) -> bool:
    """Return whether the runner withheld a case's numbers: then none of its timings leaves the file."""
    return case.check.status in ("wrong", "doubtful")


def by_scenario(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Return the cases of each scenario, in the order of the run."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.scenario, []).append(case)
    return groups


def baseline(cases: Sequence[Case]) -> Case | None:
    """Return what the cases of one scenario are compared with; None where there is nothing to compare."""
    timed = [case for case in cases if case.latency_ms and case.check.status == "ok" and case.cost.flops]
    known = [case for name in _BASELINES for case in timed if unlabelled(case.implementation) == name]
    return (known or timed)[0] if len(timed) > 1 else None


def case_rows(run: Run) -> list[Row]:
    """Return the headline of every case, compared with the baseline of its scenario."""
    bases = {scenario: baseline(cases) for scenario, cases in by_scenario(run.cases).items()}
    return [Row(run, case, comparison=_compared(bases[case.scenario], case)) for case in run.cases]


def _compared(base: Case | None, case: Case) -> Comparison | None:
    if base is None or case is base or case.check.status != "ok" or not case.cost.flops:
        return None
    return compare_implementations(base, case)


def timing_rows(files: Iterable[tuple[Path, Run]]) -> list[Row]:
    """Return a row for every way in which the cases of files were timed, each case's headline first."""
    return [
        Row(run, row.case, timing, path, row.comparison if timing is None else None)
        for path, run in files
        for row in case_rows(run)
        for timing in (None, *row.case.timings)
    ]


def _end(bounds: Interval | None, end: int) -> float | None:
    return bounds[end] if bounds else None


def _of(part: Callable[[Row], T | None], cell: Callable[[T], Cell]) -> Callable[[Row], Cell]:
    """Return a column of a part of a row; empty where there is no such part."""

    def of(row: Row) -> Cell:
        found = part(row)
        return None if found is None else cell(found)

    return of


def _latency(cell: Callable[[Latency], Cell]) -> Callable[[Row], Cell]:
    return _of(lambda row: row.latency, cell)


def _rate(cell: Callable[[Throughput], Cell]) -> Callable[[Row], Cell]:
    return _of(lambda row: row.throughput, cell)


def _headline(cell: Callable[[Case], Cell]) -> Callable[[Row], Cell]:
    return _of(lambda row: row.headline, cell)


def _spread(cell: Callable[[Spread], Cell]) -> Callable[[Row], Cell]:
    return _of(lambda row: row.spread, cell)


def _most(of: Callable[[RankFacts], int]) -> Callable[[Row], Cell]:
    """Return the most that any rank has."""
    return _spread(lambda spread: max(map(of, spread.ranks)))


def _further(name: str) -> Callable[[Row], Cell]:
    """Return the median of a further way of timing, of the headline's row alone."""

    def of(case: Case) -> Cell:
        timing = by_kind(case).get(name)
        return timing.latency_ms.median if timing and timing.latency_ms else None

    return _headline(of)


def _planned(row: Row) -> tuple[int, int] | None:
    planned = row.case.planned if row.timing is None else None
    return (planned.passes, planned.steps) if planned else None


# Column -> cell. The names and their order are stable: new columns come at the end.
COLUMNS: dict[str, Callable[[Row], Cell]] = {
    "file": lambda row: str(row.path) if row.path else None,
    "created": lambda row: row.run.created,
    "backend": lambda row: row.run.backend.name,
    "backend_version": lambda row: row.run.backend.version,
    "device": lambda row: row.run.backend.device,
    "torch": lambda row: row.run.environment.get("torch"),
    "mla": lambda row: row.run.environment.get("mla"),
    "commit": lambda row: row.run.git_commit,
    "config": lambda row: str(row.run.config.get("name", "")),
    "scenario": lambda row: row.case.scenario,
    "base": lambda row: row.case.base,
    "batch_spec": lambda row: row.case.batch_spec,
    "mode": lambda row: row.case.mode,
    "op": lambda row: row.case.op,
    "implementation": lambda row: row.case.implementation,
    "dtype": lambda row: row.case.dtype,
    "heads": lambda row: row.case.heads,
    "layers": lambda row: row.case.layers,
    "page_size": lambda row: row.case.point.get("page_size", row.run.page_size),
    "requests": lambda row: len(row.case.query_lens),
    "new_tokens": lambda row: sum(row.case.query_lens),
    "history_min_tokens": lambda row: min(row.case.history),
    "history_max_tokens": lambda row: max(row.case.history),
    "launch": lambda row: row.timing.mode if row.timing else "eager",
    "cache": lambda row: row.timing.cache if row.timing else "warm",
    "clock": lambda row: row.timing.clock if row.timing else row.case.clock,
    "status": lambda row: row.check.status,
    "reason": lambda row: row.check.reason,
    "interrupted": lambda row: row.case.interrupted,
    "latency_ms": _latency(lambda latency: latency.median),
    "latency_ci95_low_ms": _latency(lambda latency: _end(latency.ci95, 0)),
    "latency_ci95_high_ms": _latency(lambda latency: _end(latency.ci95, 1)),
    "latency_p10_ms": _latency(lambda latency: latency.p10),
    "latency_p90_ms": _latency(lambda latency: latency.p90),
    "samples": _latency(lambda latency: len(latency.samples)),
    "passes": lambda row: (row.timing or row.case).passes if row.latency else None,
    "tokens_per_s": _rate(lambda rate: rate.median),
    "tokens_per_s_ci95_low": _rate(lambda rate: _end(rate.ci95, 0)),
    "tokens_per_s_ci95_high": _rate(lambda rate: _end(rate.ci95, 1)),
    "needed_tflop_per_s": lambda row: row.per_second(row.case.cost.flops, 1e12),
    "needed_gb_per_s": lambda row: row.per_second(row.case.cost.bytes, 1e9),
    "needed_flop": lambda row: row.case.cost.flops,
    "needed_bytes": lambda row: row.case.cost.bytes,
    "limit_percent": lambda row: None if row.share is None else 100 * row.share,
    "limit": _headline(lambda case: case.roofline.bound),
    "limit_doubt": _headline(lambda case: case.roofline.doubt),
    "planning_ms": _headline(lambda case: case.plan_ms),
    "relative_error": lambda row: row.check.relative_error,
    "error_over_bound": lambda row: row.check.error_ratio,
    "weight_bytes": lambda row: row.case.memory.weight_bytes,
    "cache_bytes": lambda row: row.case.memory.cache_bytes,
    "transient_bytes": _headline(lambda case: case.memory.transient_bytes),
    "repro": lambda row: row.case.repro,
    "layout": _spread(lambda spread: spread.layout),
    "ranks": _spread(lambda spread: len(spread.ranks)),
    "predicted": lambda row: None if row.timing else is_predicted(row.case),
    "collective_ms": _spread(lambda spread: median([rank.collective_ms for rank in spread.ranks])),
    "collective_bytes": _most(lambda rank: rank.collective_bytes),
    "imbalance": _spread(imbalance),
    "rank_cache_bytes": _most(lambda rank: rank.cache_bytes),
    "rank_weight_bytes": _most(lambda rank: rank.weight_bytes),
    "repeated_flops": _of(lambda row: repeated(row.case) if row.spread else None, lambda share: share.flops),
    "repeated_bytes": _of(lambda row: repeated(row.case) if row.spread else None, lambda share: share.bytes),
    "steps_per_pass": lambda row: row.case.steps_per_pass if row.timing is None else None,
    "planned_passes": _of(_planned, lambda planned: planned[0]),
    "planned_steps": _of(_planned, lambda planned: planned[1]),
    "drift": _latency(lambda latency: latency.drift),
    "outliers": _latency(lambda latency: latency.outliers),
    "limit_ms": _headline(lambda case: case.roofline.floor_ms),
    "limit_source": _headline(lambda case: case.roofline.peak_source),
    "launch_bound": _headline(lambda case: case.launch_bound),
    "unseen_lengths_ms": _headline(lambda case: case.new_lengths.ms if case.new_lengths else None),
    "seen_lengths_ms": _headline(lambda case: case.new_lengths.repeated_ms if case.new_lengths else None),
    "baseline": _of(lambda row: row.speedup, lambda found: found.base.implementation if found.base else None),
    "speedup": _of(lambda row: row.speedup, lambda found: found.speedup),
    "speedup_low": _of(lambda row: row.speedup, lambda found: _end(found.speedup_interval, 0)),
    "speedup_high": _of(lambda row: row.speedup, lambda found: _end(found.speedup_interval, 1)),
    **{f"{name}_ms": _further(name) for name in KINDS},
}


def as_csv(rows: Iterable[Row]) -> str:
    """Return rows as CSV (RFC 4180) below the names of `COLUMNS`, in full precision."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([_written(cell(row)) for cell in COLUMNS.values()] for row in rows)
    return file.getvalue()


def _written(cell: Cell) -> Cell:
    """Return a cell as it is written: text is never a formula, and unknown is empty."""
    if isinstance(cell, bool):
        return str(cell).lower()
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
