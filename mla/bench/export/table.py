"""Results as one CSV table (RFC 4180): a row for every way in which a case was timed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mla.bench.export import withheld
from mla.bench.results import rank_columns
from mla.bench.results.schema import Case, Interval, Latency, Run, Throughput, Timing
from mla.verify.verdict import Check

Cell = str | int | float | bool | None

# A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Row:
    """A case as it was timed in one way: `timing` is None for the headline (eager, warm, host clock)."""

    path: Path
    run: Run
    case: Case
    timing: Timing | None

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

    def per_second(self, amount: int, unit: float) -> float | None:
        """Return needed work over the median time."""
        return amount / self.latency.median * 1e3 / unit if self.latency else None


def _interval(found: Latency | Throughput | None, end: int) -> float | None:
    interval: Interval | None = found.ci95 if found else None
    return interval[end] if interval else None


def _of_ranks(name: str, row: Row) -> Cell:
    """Return a fact about ranks, of the headline alone."""
    return rank_columns.flat(row.case)[name] if row.timing is None else None


# Column -> cell. The names and their order are stable: new columns come at the end.
COLUMNS: dict[str, Callable[[Row], Cell]] = {
    "file": lambda row: str(row.path),
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
    "latency_ms": lambda row: row.latency.median if row.latency else None,
    "latency_ci95_low_ms": lambda row: _interval(row.latency, 0),
    "latency_ci95_high_ms": lambda row: _interval(row.latency, 1),
    "latency_p10_ms": lambda row: row.latency.p10 if row.latency else None,
    "latency_p90_ms": lambda row: row.latency.p90 if row.latency else None,
    "samples": lambda row: len(row.latency.samples) if row.latency else None,
    "passes": lambda row: (row.timing or row.case).passes if row.latency else None,
    "tokens_per_s": lambda row: row.throughput.median if row.throughput else None,
    "tokens_per_s_ci95_low": lambda row: _interval(row.throughput, 0),
    "tokens_per_s_ci95_high": lambda row: _interval(row.throughput, 1),
    "needed_tflop_per_s": lambda row: row.per_second(row.case.cost.flops, 1e12),
    "needed_gb_per_s": lambda row: row.per_second(row.case.cost.bytes, 1e9),
    "needed_flop": lambda row: row.case.cost.flops,
    "needed_bytes": lambda row: row.case.cost.bytes,
    "limit_percent": lambda row: _percent(row.headline),
    "limit": lambda row: row.headline.roofline.bound if row.headline else None,
    "limit_doubt": lambda row: row.headline.roofline.doubt if row.headline else None,
    "planning_ms": lambda row: row.headline.plan_ms if row.headline else None,
    "relative_error": lambda row: row.check.relative_error,
    "error_over_bound": lambda row: row.check.error_ratio,
    "weight_bytes": lambda row: row.case.memory.weight_bytes,
    "cache_bytes": lambda row: row.case.memory.cache_bytes,
    "transient_bytes": lambda row: row.headline.memory.transient_bytes if row.headline else None,
    "repro": lambda row: row.case.repro,
    **{name: partial(_of_ranks, name) for name in rank_columns.COLUMNS},
}


def _percent(case: Case | None) -> float | None:
    """Return the share of the limit; None where limit or time is in doubt."""
    fraction = None if case is None or case.roofline.doubt else case.roofline.fraction
    return None if fraction is None else 100 * fraction


def rows(files: Iterable[tuple[Path, Run]]) -> list[Row]:
    """Return the rows of all cases, each case's headline first."""
    return [
        Row(path, run, case, timing) for path, run in files for case in run.cases for timing in _ways(case)
    ]


def _ways(case: Case) -> Iterator[Timing | None]:
    yield None
    yield from case.timings


def render(table: Sequence[Row]) -> str:
    """Return the rows as CSV below the names of `COLUMNS`, in full precision."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([_written(cell(row)) for cell in COLUMNS.values()] for row in table)
    return file.getvalue()


def _written(cell: Cell) -> Cell:
    """Return a cell as it is written: text is never a formula, and unknown is empty."""
    if isinstance(cell, bool):
        return str(cell).lower()
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
