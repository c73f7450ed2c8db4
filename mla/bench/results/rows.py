"""The one flat row of a case: what tables, CSV files and the page say of it. Needs no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mla.bench.results.cases import KINDS, Repeated, by_kind, imbalances, is_predicted, repeated, unlabelled
from mla.bench.results.compare import Comparison, compare_implementations
from mla.bench.results.schema import Case, Latency, Run, Spread, Throughput, Timing
from mla.bench.results.stats import median
from mla.text import grouped
from mla.verify.verdict import Check

Cell = str | int | float | bool | None

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
    difference: float | None = None  # of outputs, relative to those of the scenario's first implementation

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
    def repeated(self) -> Repeated | None:
        """What the layout has ranks repeat, of the headline alone."""
        return repeated(self.case) if self.spread else None

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

    @property
    def further(self) -> dict[str, Latency]:
        """The latencies by the names of `KINDS`, of the headline's row alone."""
        return by_kind(self.case) if self.headline else {}


def withheld(case: Case) -> bool:
    """Return whether the runner withheld a case's numbers: then none of its timings leaves the file."""
    return case.check.status in ("wrong", "doubtful")


def by_scenario(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Return the cases of each scenario, in the order of the run."""
    return grouped(cases, lambda case: case.scenario)


def baseline(cases: Sequence[Case]) -> Case | None:
    """Return what the cases of one scenario are compared with; None where there is nothing to compare."""
    timed = [case for case in cases if case.latency_ms and case.check.status == "ok" and case.cost.flops]
    known = [case for name in _BASELINES for case in timed if unlabelled(case.implementation) == name]
    return (known or timed)[0] if len(timed) > 1 else None


def first_run(cases: Sequence[Case]) -> Case:
    """Return the first case that was run, or the first if none was."""
    ran = (case for case in cases if case.latency_ms or case.check.status != "not run")
    return next(ran, cases[0])


def case_rows(run: Run) -> list[Row]:
    """Return the headline of every case, compared with the baseline of its scenario."""
    rows, scenarios = [], by_scenario(run.cases)
    known = {scenario: (baseline(cases), first_run(cases)) for scenario, cases in scenarios.items()}
    for case in run.cases:
        base, first = known[case.scenario]
        apart = {other.implementation: other.relative_difference for other in case.agreement}
        difference = apart.get(first.implementation)
        judged = case is not base and case.check.status == "ok" and case.cost.flops
        comparison = compare_implementations(base, case) if base and judged else None
        rows.append(Row(run, case, comparison=comparison, difference=difference))
    return rows


def timing_rows(files: Iterable[tuple[Path, Run]]) -> list[Row]:
    """Return a row for every way in which the cases of files were timed, each case's headline first."""
    return [
        Row(run, row.case, timing, path, row.comparison if timing is None else None)
        for path, run in files
        for row in case_rows(run)
        for timing in (None, *row.case.timings)
    ]


# Column -> where its cell is in a row, or what makes it. Names and order are stable: new columns come last.
COLUMNS: dict[str, str | Callable[[Row], Cell]] = {
    "file": lambda row: str(row.path) if row.path else None,
    "created": "run.created",
    "backend": "run.backend.name",
    "backend_version": "run.backend.version",
    "device": "run.backend.device",
    "torch": "run.environment.torch",
    "mla": "run.environment.mla",
    "commit": "run.git_commit",
    "config": lambda row: str(row.run.config.get("name", "")),
    "scenario": "case.scenario",
    "base": "case.base",
    "batch_spec": "case.batch_spec",
    "mode": "case.mode",
    "op": "case.op",
    "implementation": "case.implementation",
    "dtype": "case.dtype",
    "heads": "case.heads",
    "layers": "case.layers",
    "page_size": lambda row: row.case.point.get("page_size", row.run.page_size),
    "requests": lambda row: len(row.case.query_lens),
    "new_tokens": lambda row: sum(row.case.query_lens),
    "history_min_tokens": lambda row: min(row.case.history),
    "history_max_tokens": lambda row: max(row.case.history),
    "launch": lambda row: row.timing.mode if row.timing else "eager",
    "cache": lambda row: row.timing.cache if row.timing else "warm",
    "clock": lambda row: (row.timing or row.case).clock,
    "status": "check.status",
    "reason": "check.reason",
    "interrupted": "case.interrupted",
    "latency_ms": "latency.median",
    "latency_ci95_low_ms": "latency.ci95.0",
    "latency_ci95_high_ms": "latency.ci95.1",
    "latency_p10_ms": "latency.p10",
    "latency_p90_ms": "latency.p90",
    "samples": lambda row: len(row.latency.samples) if row.latency else None,
    "passes": lambda row: (row.timing or row.case).passes if row.latency else None,
    "tokens_per_s": "throughput.median",
    "tokens_per_s_ci95_low": "throughput.ci95.0",
    "tokens_per_s_ci95_high": "throughput.ci95.1",
    "needed_tflop_per_s": lambda row: row.per_second(row.case.cost.flops, 1e12),
    "needed_gb_per_s": lambda row: row.per_second(row.case.cost.bytes, 1e9),
    "needed_flop": "case.cost.flops",
    "needed_bytes": "case.cost.bytes",
    "limit_percent": lambda row: None if row.share is None else 100 * row.share,
    "limit": "headline.roofline.bound",
    "limit_doubt": "headline.roofline.doubt",
    "planning_ms": "headline.plan_ms",
    "relative_error": "check.relative_error",
    "error_over_bound": "check.error_ratio",
    "weight_bytes": "case.memory.weight_bytes",
    "cache_bytes": "case.memory.cache_bytes",
    "transient_bytes": "headline.memory.transient_bytes",
    "repro": "case.repro",
    "layout": "spread.layout",
    "ranks": lambda row: len(row.spread.ranks) if row.spread else None,
    "predicted": lambda row: None if row.timing else is_predicted(row.case),
    "collective_ms": lambda row: _of_ranks(row, "collective_ms", median),
    "collective_bytes": lambda row: _of_ranks(row, "collective_bytes", max),
    "imbalance": lambda row: max(imbalances(row.spread)) if row.spread else None,
    "rank_cache_bytes": lambda row: _of_ranks(row, "cache_bytes", max),
    "rank_weight_bytes": lambda row: _of_ranks(row, "weight_bytes", max),
    "repeated_flops": "repeated.flops",
    "repeated_bytes": "repeated.bytes",
    "steps_per_pass": lambda row: row.case.steps_per_pass if row.timing is None else None,
    "planned_passes": lambda row: None if row.timing else _at(row, "case.planned.passes"),
    "planned_steps": lambda row: None if row.timing else _at(row, "case.planned.steps"),
    "drift": "latency.drift",
    "outliers": "latency.outliers",
    "limit_ms": "headline.roofline.floor_ms",
    "limit_source": "headline.roofline.peak_source",
    "launch_bound": "headline.launch_bound",
    "unseen_lengths_ms": "headline.new_lengths.ms",
    "seen_lengths_ms": "headline.new_lengths.repeated_ms",
    "baseline": "speedup.base.implementation",
    "speedup": "speedup.speedup",
    "speedup_low": "speedup.speedup_interval.0",
    "speedup_high": "speedup.speedup_interval.1",
    **{f"{name}_ms": f"further.{name}.median" for name in KINDS},
    "cache_format": "case.point.cache_format",
    "format_error": "case.format_error",
    "topk": "case.point.topk",
    "selection": "case.point.selection",
    "index_format": "case.point.index_format",
}


def cell(row: Row, column: str) -> Cell:
    """Return a row's cell of one of `COLUMNS`; None if it is unknown."""
    where = COLUMNS[column]
    return _at(row, where) if isinstance(where, str) else where(row)


def _at(row: Row, path: str) -> Cell:
    """Return what names of fields, keys and places lead to; None where one of them leads to nothing."""
    value: Any = row
    for name in path.split("."):
        if value is None:
            break
        if isinstance(value, dict):
            value = value.get(name)
        else:
            value = value[int(name)] if name.isdigit() else getattr(value, name)
    return cast("Cell", value)


def _of_ranks(row: Row, field: str, of: Callable[[list[Any]], Cell]) -> Cell:
    """Return one number for a field of all ranks; None on one device."""
    return of([getattr(rank, field) for rank in row.spread.ranks]) if row.spread else None


def as_csv(rows: Iterable[Row]) -> str:
    """Return rows as CSV (RFC 4180) below the names of `COLUMNS`, in full precision."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([_written(cell(row, column)) for column in COLUMNS] for row in rows)
    return file.getvalue()


def _written(value: Cell) -> Cell:
    """Return a cell as it is written: text is never a formula, and unknown is empty."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
