"""Everything the page says about one file except its panels. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from mla.bench.report import doubts
from mla.bench.report.doubts import Badge
from mla.bench.report.panel import case_name
from mla.bench.report.series import ResultFile, grouped
from mla.bench.report.tables import ResultRow, css_class, result_rows
from mla.bench.results.passes import as_planned
from mla.bench.results.rows import case_rows
from mla.bench.results.schema import Case, Run
from mla.bench.terminal import ranks, run_table
from mla.bench.terminal.digits import number
from mla.bench.terminal.lines import quality_warnings
from mla.bench.terminal.verdict import Verdict, verdicts, why_unreliable
from mla.text import size

# Most headlines of one file; a grid has a headline per point.
MOST_LINES = 6


@dataclass(frozen=True)
class Headline:
    """The number of a case: what it is, its value, and the share of the limit that it reaches."""

    status: str  # CSS class
    what: str
    value: str
    share: float | None = None  # in percent
    limit: str = ""  # which limit


@dataclass(frozen=True)
class CaseMethod:
    """How one case was measured, and the command that repeats it."""

    name: str
    repro: str
    method: list[tuple[str, str]]


@dataclass(frozen=True)
class Summary:
    """One file, ready for the template. `status` is that of the first badge, the worst of its cases."""

    file: ResultFile
    facts: list[tuple[str, str]]
    verdicts: list[Verdict]
    badges: list[Badge]
    named: list[Badge]  # what is wrong or in doubt, case by case
    headlines: list[Headline]
    more: str  # how many cases have no headline here
    counted: str  # how many cases the warnings are about
    warnings: list[str]
    limits: list[str]  # what is uncertain about the limits
    agreement: list[str]
    columns: list[str]
    rows: list[ResultRow]
    environment: list[tuple[str, str]]
    config: list[tuple[str, str]]
    cases: list[CaseMethod]

    @property
    def status(self) -> str:
        """The worst status of the file's cases, as a CSS class."""
        return self.badges[0].status


def summary(file: ResultFile) -> Summary:
    """Return what the page says about a file."""
    run = file.run
    leading = run_table.leading(msgspec.structs.replace(run, cases=_headlined(run)))
    return Summary(
        file,
        _facts(file),
        verdicts(run)[:MOST_LINES],
        doubts.badges(run.cases),
        doubts.named(run.cases),
        list(map(_headline, leading[:MOST_LINES])),
        _more(run, len(leading)),
        doubts.counted_remarks(run),
        quality_warnings(run),
        list(dict.fromkeys(doubts.of_limits(run.ceilings))),
        run_table.comparisons(run),
        list(run_table.columns(run.cases)),
        result_rows(case_rows(run)),
        environment(file),
        config(file),
        [CaseMethod(case_name(case), case.repro, method(case)) for case in run.cases],
    )


def _headline(case: Case) -> Headline:
    text, limit = run_table.headline(case), case.roofline
    if case.latency_ms is None:
        what, _, value = text.rpartition(": no number, check: ")
        return Headline(css_class(case), what, f"no number: {value}")
    what, _, value = text.rpartition(": ")
    if why_unreliable(case):
        return Headline("doubtful", what, value)  # looks like a number that is withheld
    if limit.fraction is None or limit.doubt:
        return Headline(css_class(case), what, value)
    return Headline(css_class(case), what, value, 100 * limit.fraction, f"{limit.bound} limit")


def _headlined(run: Run) -> list[Case]:
    """Return the cases outside of a grid; of a grid alone, all of its points if they are few."""
    plain = [case for case in run.cases if not case.point]
    return plain or (run.cases if len(run.cases) <= MOST_LINES else [])


def _more(run: Run, headlines: int) -> str:
    points = sum(bool(case.point) for case in run.cases)
    if points:
        return f"{'and ' * bool(headlines)}{points} grid cases in the table"
    return f"and {headlines - MOST_LINES} more in the table" if headlines > MOST_LINES else ""


def _facts(file: ResultFile) -> list[tuple[str, str]]:
    run = file.run
    layer = ", ".join(filter(None, (file.config, run.dtype, f"attention {run.attention}", _pages(run))))
    return [
        ("device", f"{run.backend.device} (backend {run.backend.name})"),
        ("layer", layer),
        ("measured", run.created.replace("T", " ").replace("+00:00", " UTC")),
        ("commit", _short(run.git_commit)),
    ]


def _short(commit: str | None) -> str:
    """Return an abbreviated commit, keeping its "-dirty" suffix."""
    name, dash, rest = (commit or "unknown").partition("-")
    return f"{name[:12]}{dash}{rest}"


def _pages(run: Run) -> str:
    return f"page size {run.page_size}"


def environment(file: ResultFile) -> list[tuple[str, str]]:
    """Return everything a file records about where and how it was measured."""
    run = file.run
    rows = [
        ("command", " ".join([*run.argv[:1], shlex.join(run.argv[1:])])),
        ("created", run.created),
        ("commit", run.git_commit or "unknown"),
        ("schema version", str(run.schema_version)),
        ("backend", " ".join(filter(None, (run.backend.name, run.backend.version)))),
        ("device", run.backend.device),
        ("device memory", _bytes(run.backend.memory_bytes)),
        ("last-level cache", _bytes(run.backend.cache_bytes)),
        ("dtype", run.dtype),
        ("attention", run.attention),
        ("page size", str(run.page_size)),
        ("seed", str(run.seed)),
    ]
    return [*rows, *run.environment.items()]


def config(file: ResultFile) -> list[tuple[str, str]]:
    """Return the dimensions of the layer that was run."""
    known = {**file.run.config, "name": file.config or None}  # the name may be a whole path
    return [(key, _value(value)) for key, value in known.items() if value is not None]


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return str(value)


def _bytes(count: int | None) -> str:
    return size(count, unknown="unknown", GiB=".1f", MiB=".0f")


def method(case: Case) -> list[tuple[str, str]]:
    """Return how a case was measured."""
    lengths = f"new tokens {_runs(case.query_lens)}; history {_runs(case.history)}"
    passes = f"{case.passes} passes of {case.steps_per_pass}"
    if case.planned and not as_planned(case):
        passes += f" (planned were {case.planned.passes} of {case.planned.steps})"
    rows = [
        ("requests", f"{len(case.query_lens)}; {lengths}"),
        ("timed", f"{passes} after {case.warmups} warm-ups, {case.clock} clock"),
        ("interleaved with", ", ".join(case.interleaved_with) or "nothing: it ran alone"),
    ]
    if case.spread is not None and case.spread.predicted:
        rows.append(("predicted", ranks.prediction(case.spread, number).replace("\n", " ")))
    rows += [("ops", _ops(case))] * bool(case.ops)
    rows += [(name, "; ".join(remarks)) for name, remarks in case.op_remarks.items()]
    states = [", ".join(f"{key} {value}" for key, value in state.items()) for state in case.device_state]
    return rows + [("device state", "; then ".join(states))] * bool(states)


def _ops(case: Case) -> str:
    """Return each op with the roles it served."""
    names = grouped(case.ops, lambda role: case.ops[role])
    return "; ".join(f"{name} for {', '.join(roles)}" for name, roles in names.items())


def _runs(lengths: Sequence[int]) -> str:
    """Return lengths with repeats folded, such as "50 x4, 100 x4"."""
    folded: list[list[int]] = []
    for length in lengths:
        if folded and folded[-1][0] == length:
            folded[-1][1] += 1
        else:
            folded.append([length, 1])
    return ", ".join(f"{length}" if count == 1 else f"{length} x{count}" for length, count in folded)
