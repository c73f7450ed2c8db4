"""Print a run as a table, Markdown, CSV or JSON. Reads results only, so it needs no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from mla.bench import results
from mla.bench.results import rank_columns
from mla.bench.results.passes import as_planned
from mla.bench.results.predicted import labelled
from mla.bench.results.schema import Case, Run
from mla.bench.results.timings import cold, flat_timings
from mla.bench.terminal import ceilings, ranks, stages
from mla.bench.terminal.case_lines import case_lines
from mla.bench.terminal.digits import between, known, number, quoted
from mla.bench.terminal.timings import timing_lines
from mla.bench.terminal.verdict import headline_number, same_ops, speed, verdicts, why_unreliable
from mla.command.console import results_stream
from mla.command.table import markdown
from mla.text import size

__all__ = ["COLUMNS", "FORMATS", "columns", "comparisons", "headline", "headlines", "leading", "render"]

FORMATS = ("table", "md", "csv", "json")

# Column title -> cell. Unknown prints "-".
COLUMNS: dict[str, Callable[[Case], str]] = {
    "scenario": lambda case: case.scenario + _layers(case),
    "implementation": lambda case: case.implementation,
    "latency ms": lambda case: _estimate(case.latency_ms),
    "95% CI": lambda case: _interval(case.latency_ms),
    "p10 .. p90": lambda case: _spread(case.latency_ms),
    "cold ms": lambda case: _estimate(cold(case)) if case.check.status in ("ok", "not run") else "-",
    "tok/s": lambda case: _estimate(case.tokens_per_s),
    "TFLOP/s": lambda case: _rate(case, case.cost.flops, 1e12),
    "GB/s": lambda case: _rate(case, case.cost.bytes, 1e9),
    "% of limit": lambda case: _limit(case.roofline),
    "rel. error": lambda case: _exponent(case.check.relative_error),
    "check": lambda case: case.check.status,
}
# A further column where a case ran fewer passes, or shorter ones, than the workload asks for.
PASSES = {"passes": lambda case: f"{case.passes} x {case.steps_per_pass}" if case.passes else "-"}

# Colours of a row on a terminal, by the status of its check.
_STYLES = {"wrong": "red", "doubtful": "magenta"}


def render(run: Run, kind: str) -> str:
    """Return the run in one of `FORMATS`, ending in a newline."""
    if kind == "json":
        return results.encode(run).decode()
    if kind == "csv":
        return _csv(run.cases)
    run = labelled(run)
    body = _markdown(run.cases) if kind == "md" else _table(run.cases)
    parts = ranks.render(run.cases, kind, number) + stages.render(run.cases, kind, number, _limit)
    about = [*timing_lines(run), *case_lines(run)]
    said = list(map(str, verdicts(run)))
    blocks = (about, ceilings.run_lines(run.ceilings), comparisons(run), said, headlines(run))
    return f"{body}\n{parts}" + "\n".join("".join(f"{line}\n" for line in lines) for lines in blocks if lines)


def columns(cases: Sequence[Case]) -> dict[str, Callable[[Case], str]]:
    """Return the columns of a table of these cases."""
    return COLUMNS if all(map(as_planned, cases)) else COLUMNS | PASSES


def comparisons(run: Run) -> list[str]:
    """Return one line per scenario and pair: the first implementation that ran, and each other one."""
    lines = []
    for scenario, cases in _by_scenario(run).items():
        first = _first_run(cases)
        others = {case.implementation: case for case in cases if case is not first}
        for agreement in first.agreement:
            other = others.get(agreement.implementation)
            if other is not None:
                lines.append(f"{scenario}: {_comparison(first, other, agreement)}")
    return lines


def _first_run(cases: Sequence[Case]) -> Case:
    """Return the first case that was run, or the first if none was."""
    ran = (case for case in cases if case.latency_ms or case.check.status != "not run")
    return next(ran, cases[0])


def _comparison(case: Case, other: Case, agreement: results.Agreement) -> str:
    """Return how a case compares with another: speed, outputs, cache and transient memory."""
    return (
        f"{_speeds(case, other)} outputs differ by {_exponent(agreement.relative_difference)}; cache "
        f"{_mib(case.memory.cache_bytes)} against {_mib(other.memory.cache_bytes)}; transient "
        f"{_mib(case.memory.transient_bytes)} against {_mib(other.memory.transient_bytes)}"
    )


def _speeds(case: Case, other: Case) -> str:
    """Return how fast a case is by the table's latencies, if that is decided."""
    if same_ops(case, other):
        return f"{case.implementation} runs the same ops as {other.implementation};"
    found = speed(case, other)
    if found is None or not found.decided:
        return f"{case.implementation} and {other.implementation}:"
    return f"{case.implementation} is {found} as {other.implementation};"


def _by_scenario(run: Run) -> dict[str, list[Case]]:
    grouped: dict[str, list[Case]] = {}
    for case in run.cases:
        grouped.setdefault(case.scenario, []).append(case)
    return grouped


def headlines(run: Run) -> list[str]:
    """Return one line per scenario for the first implementation that ran it."""
    return list(map(headline, leading(run)))


def leading(run: Run) -> list[Case]:
    """Return the case of the first implementation that ran, for every scenario."""
    return list(map(_first_run, _by_scenario(run).values()))


def headline(case: Case) -> str:
    """Return the latency of a prefill or of an op, or the throughput of a decode."""
    parts = [case.scenario] * (case.scenario != case.mode)
    parts += [case.implementation] * (case.implementation != "mla")
    parts += [_layers(case).strip()] * (case.layers > 1)
    of = f" [{', '.join(parts)}]" if parts else ""
    kind = "Batch" if case.batch_spec else case.mode.title()
    estimate, what = headline_number(case), "Op" if case.op else kind
    if estimate is None:
        return f"{what}{of}: no number, check: {case.check.status}"
    why = why_unreliable(case)
    few = f" ({why})" if why and estimate.ci95 is None else ""
    if estimate is case.latency_ms:
        return f"{what} Latency{of}: {_quoted(estimate, 'ms')}{few}"
    return f"Decode Throughput{of}: {_quoted(estimate, 'tok/s')}{few}"


def unreliable_headlines(run: Run) -> list[str]:
    """Return the headlines that are not to be relied on, and why."""
    found = []
    for case in leading(run):
        line, why = headline(case), why_unreliable(case)
        found += [line if line.endswith(f"({why})") else f"{line}: {why}"] * bool(why)
    return found


def _layers(case: Case) -> str:
    """Return a note that numbers are per layer, if several ran."""
    return f" per layer of {case.layers}" if case.layers > 1 else ""


def _cells(cases: Sequence[Case]) -> Iterable[list[str]]:
    cells = columns(cases).values()
    return ([cell(case) for cell in cells] for case in cases)


def _table(cases: Sequence[Case]) -> str:
    console = Console(file=results_stream())
    can_draw = console.encoding.startswith("utf")
    table = Table(box=box.SIMPLE_HEAD if can_draw else box.ASCII, pad_edge=False)
    for title in columns(cases):
        side: JustifyMethod = "left" if title in ("scenario", "implementation") else "right"
        table.add_column(title, justify=side, no_wrap=True)
    for case, cells in zip(cases, _cells(cases), strict=True):
        table.add_row(*(Text(cell) for cell in cells), style=_STYLES.get(case.check.status, ""))
    wide = Console(
        file=io.StringIO(),
        width=max(console.width, 1000),  # a truncated number is worse than a wrapped line
        force_terminal=console.is_terminal,
        color_system="standard" if console.is_terminal else None,
    )
    wide.print(table)
    lines = wide.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip()) + _reasons(cases)


def _reasons(cases: Sequence[Case]) -> str:
    wrong = [case for case in cases if case.check.status != "ok"]
    lines = [f"{case.scenario}, {case.implementation}: {case.check.reason}\n" for case in wrong]
    return "\n" * bool(wrong) + "".join(lines)


def _markdown(cases: Sequence[Case]) -> str:
    return markdown(list(columns(cases)), _cells(cases)) + _reasons(cases)


def _csv(cases: Sequence[Case]) -> str:
    """Return all cases as CSV, in full precision."""
    file = io.StringIO()
    rows = [_flat(case) for case in cases]
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _flat(case: Case) -> dict[str, object]:
    latency, rate = case.latency_ms, case.tokens_per_s
    low, high = (latency.ci95 if latency else None) or (None, None)
    return {
        "scenario": case.scenario,
        "mode": case.mode,
        "implementation": case.implementation,
        "check": case.check.status,
        "error_ratio": case.check.error_ratio,
        "latency_ms": latency.median if latency else None,
        "ci_low_ms": low,
        "ci_high_ms": high,
        "p10_ms": latency.p10 if latency else None,
        "p90_ms": latency.p90 if latency else None,
        "tokens_per_s": rate.median if rate else None,
        "floor_ms": case.roofline.floor_ms,
        "limit": case.roofline.bound,
        "limit_source": case.roofline.peak_source,
        "flops": case.cost.flops,
        "bytes": case.cost.bytes,
        "layers": case.layers,
        "passes": case.passes,
        "steps_per_pass": case.steps_per_pass,
        "planned_passes": case.planned.passes if case.planned else None,
        "planned_steps": case.planned.steps if case.planned else None,
        "cache_bytes": case.memory.cache_bytes,
        "transient_bytes": case.memory.transient_bytes,
        "clock": case.clock,
        **rank_columns.flat(case),
        "drift": latency.drift if latency else None,
        "outliers": latency.outliers if latency else None,
        "launch_bound": case.launch_bound,
        "plan_ms": case.plan_ms,
        "new_lengths_ms": case.new_lengths.ms if case.new_lengths else None,
        "repeated_lengths_ms": case.new_lengths.repeated_ms if case.new_lengths else None,
        **flat_timings(case),
        "reason": case.check.reason,
        "repro": case.repro,
    }


def _rate(case: Case, amount: int, unit: float) -> str:
    """Return necessary work per time; extra work of an implementation does not count."""
    return number(amount / case.latency_ms.median * 1e3 / unit if case.latency_ms else None)


def _limit(roofline: results.Roofline) -> str:
    """Return the share of the limit and its kind, such as "71 mem"; ">100?" where that is in doubt."""
    if roofline.doubt:
        return f">100? {(roofline.bound or '')[:3]}".strip()
    if roofline.fraction is None:
        return "-"
    return " ".join((f"{100 * roofline.fraction:.0f}", (roofline.bound or "")[:3])).strip()


def _estimate(estimate: results.Latency | results.Throughput | None) -> str:
    return known(estimate.median, estimate.ci95) if estimate else "-"


def _quoted(estimate: results.Latency | results.Throughput, unit: str) -> str:
    return quoted(estimate.median, estimate.ci95, unit)


def _interval(latency: results.Latency | None) -> str:
    return between(latency.ci95, latency.median, latency.ci95) if latency else "-"


def _spread(latency: results.Latency | None) -> str:
    return between((latency.p10, latency.p90), latency.median, latency.ci95) if latency else "-"


def _mib(count: int | None) -> str:
    return size(count, MiB=number)


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
