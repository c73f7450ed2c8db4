"""Print a run as a table, Markdown, CSV or JSON. Reads results only, so it needs no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

from mla.bench import results
from mla.bench.results.cases import as_planned, by_kind, labelled
from mla.bench.results.rows import Row, as_csv, baseline, by_scenario, case_rows, first_run, withheld
from mla.bench.results.schema import Case, Latency, Run
from mla.bench.terminal import ceilings, tables
from mla.bench.terminal.digits import between, estimated, limit, number, per_second, percent, quoted
from mla.bench.terminal.lines import case_lines, name
from mla.bench.terminal.tables import Table
from mla.bench.terminal.verdict import headline_number, mark, status, times_as_fast, verdicts, why_unreliable
from mla.command.display import aligned, width
from mla.text import size

FORMATS = ("table", "md", "csv", "json")
Detail = Literal["quiet", "short", "verbose"]

# Column title -> cell, with `verbose`, in Markdown and on the page. Unknown prints "-".
COLUMNS: dict[str, Callable[[Row], str]] = {
    "scenario": lambda row: row.case.scenario + _layers(row.case),
    "implementation": lambda row: row.case.implementation,
    "latency ms": lambda row: estimated(row.latency),
    "95% CI": lambda row: _interval(row.latency),
    "p10 .. p90": lambda row: _spread(row.latency),
    "cold ms": lambda row: estimated(row.further.get("cold")),
    "tok/s": lambda row: estimated(row.throughput),
    "FLOP/s": lambda row: per_second(row.per_second(row.case.cost.flops, 1), ""),
    "GB/s": lambda row: number(row.per_second(row.case.cost.bytes, 1e9)),
    "% of limit": lambda row: limit(row.case.roofline),
    "rel. error": lambda row: _exponent(row.check.relative_error),
    "check": lambda row: row.check.status,
    "difference": lambda row: _exponent(row.difference),
    "cache": lambda row: size(row.case.memory.cache_bytes),
    "transient": lambda row: size(row.case.memory.transient_bytes),
    "passes": lambda row: f"{row.case.passes} x {row.case.steps_per_pass}" if row.case.passes else "-",
    "format error": lambda row: _exponent(row.case.format_error),
}

# What the short table holds beside its numbers, the first to go last; and which of its columns are words.
_EXTRAS = ("interval", "interval of the speedup", "limit")
_LEFT = ("scenario", "implementation", "latency", "speedup")
# What to do about a case without a number.
_REMEDIES = {
    "wrong": "Save the failing call: --dump-failure DIR.",
    "doubtful": "Rerun when idle; if it stays, the backend's clock or `synchronize` is at fault.",
    "not timed": "Continue the run: --resume FILE.",
}


def render(run: Run, kind: str, detail: Detail = "short", hint: str = "") -> str:
    """Return the run in one of `FORMATS`, ending in a newline; `hint` says what to do next.

    `detail` is of a table: the headlines alone, what a first look needs, or everything that is known.
    Markdown always has everything; CSV and JSON are for machines.
    """
    if kind == "json":
        return results.encode(run).decode()
    if kind == "csv":
        return as_csv(case_rows(run)).replace("\r\n", "\n")  # for a terminal; names are printable by now
    run = labelled(run)
    if kind == "table" and detail == "quiet":
        blocks = [headlines(run)]
    elif kind == "table" and detail == "short":
        sweeps = [str(verdict) for verdict in verdicts(run) if verdict.is_sweep]
        blocks = [
            _wrapped(context(run)),
            _face(case_rows(run)),
            _reasons(run.cases),
            sweeps,
            _parts(run, kind),
            _wrapped(*_about(run)),
            _wrapped(hint),
            headlines(run),
        ]
    else:
        title = [context(run)] * (kind == "table")
        blocks = [title, *_detailed(run, kind)]
    return "\n".join("".join(f"{line}\n" for line in lines) for lines in blocks if lines)


def _detailed(run: Run, kind: str) -> Iterator[list[str]]:
    """Yield everything that is known of a run, in blocks of lines."""
    yield results_table(run).text(kind).splitlines()
    yield _reasons(run.cases)
    yield _parts(run, kind)
    yield case_lines(run)
    yield ceilings.run_lines(run.ceilings)
    yield list(map(str, verdicts(run)))
    yield headlines(run)


def results_table(run: Run) -> Table:
    """Return the table of all cases; below their rows, the page says what is wrong or in doubt."""
    shown, remarks = columns(run.cases), []
    for case in run.cases:
        doubt = f"suspect limit or time: {case.roofline.doubt}" if case.roofline.doubt else ""
        reason = case.check.reason if case.check.status != "ok" else ""
        remarks.append("; ".join(filter(None, (reason, doubt))))
    cells = [[cell(row) for cell in shown.values()] for row in case_rows(run)]
    return Table("", list(shown), cells, marks=list(map(mark, run.cases)), remarks=remarks)


def _parts(run: Run, kind: str) -> list[str]:
    """Return the tables of ranks and of stages, which only some runs have."""
    ranks = tables.ranks(run.cases)
    text = "\n".join(table.text(kind) for table in [*ranks, *tables.stages(run.cases)])
    measured = any(case.spread and not case.spread.predicted for case in run.cases)
    return [*text.splitlines(), *["", *tables.MEASURED_RANKS.splitlines()] * measured]


def columns(cases: Sequence[Case]) -> dict[str, Callable[[Row], str]]:
    """Return the columns of a detailed table of these cases: some only where a case has something there."""
    shown = {
        "cold ms": any("cold" in by_kind(case) for case in cases),
        "difference": any(case.agreement for case in cases),
        "passes": not all(map(as_planned, cases)),
        "format error": any(case.format_error for case in cases),
    }
    return {title: cell for title, cell in COLUMNS.items() if shown.get(title, True)}


def context(run: Run) -> str:
    """Return what ran where, in one line."""
    facts, layer = run.environment, [str(run.config.get("name") or ""), ceilings.short(run.dtype)]
    threads = facts.get("torch_threads", "")
    device = f"{run.backend.name}: {run.backend.device}"
    device += f", {threads} thread{'s' * (threads != '1')}" * (facts.get("processor") == run.backend.device)
    layouts = {case.spread.layout: None for case in run.cases if case.spread}
    ops = dict.fromkeys(case.op for case in run.cases if case.op)
    layer += [f"op {op}" for op in ops] + list(layouts)
    versions = [f"{package} {facts[package]}" for package in ("mla", "torch") if package in facts]
    return " | ".join([*versions[:1], device, *versions[1:], ", ".join(filter(None, layer))])


def _face(rows: Sequence[Row]) -> list[str]:
    """Return the short table, with as many of `_EXTRAS` as its width holds."""
    header = ["scenario", "implementation", "latency", "throughput", "of peak"]
    header += ["speedup"] * any(row.comparison for row in rows)
    for kept in range(len(_EXTRAS), -1, -1):
        cells = [_face_cells(row, _EXTRAS[:kept])[: len(header)] for row in rows]
        plain = aligned(header, cells, _LEFT)
        if max(map(len, plain.splitlines())) <= width():
            break
    marks = [mark(row.case) for row in rows]
    return Table("", header, cells, words=_LEFT, marks=marks).text("table").splitlines()


def _face_cells(row: Row, extras: Collection[str]) -> tuple[str, ...]:
    """Return the cells of the short table: instead of a number that is withheld or missing, a word."""
    case, latency = row.case, row.latency
    if latency is None:
        word = status(case).upper() if withheld(case) else status(case)
        return (case.scenario, case.implementation, word, "", "", "")
    interval = f" ({_interval(latency)})" if "interval" in extras and latency.ci95 else ""
    bound = f" {case.roofline.bound}" if "limit" in extras and row.share is not None else ""
    return (
        case.scenario,
        case.implementation,
        f"{estimated(latency)} ms{interval}",
        _work_rate(row),
        "above limit" if case.roofline.doubt else percent(row.share) + bound,
        _speedup(row, "interval of the speedup" in extras),
    )


def _work_rate(row: Row) -> str:
    """Return tokens per second of a layer, and of one op the work that limits it."""
    case, rate = row.case, row.throughput
    if case.op:
        computes = case.roofline.bound == "compute"
        amount = case.cost.flops if computes else case.cost.bytes
        return per_second(row.per_second(amount, 1), "FLOP/s" if computes else "B/s")
    return f"{estimated(rate)} tok/s" if rate else "-"


def _speedup(row: Row, with_interval: bool) -> str:
    """Return the speedup over the baseline where it is decided: otherwise any ratio would be noise."""
    if row.comparison is None:
        return ""
    if row.speedup is None:
        return "undecided"
    ratio, interval = times_as_fast(row.speedup)
    return f"{ratio} {interval}".strip() if with_interval else ratio


def _reasons(cases: Sequence[Case]) -> list[str]:
    """Return why cases have no number, and how to go on."""
    lines = []
    for case in cases:
        if case.check.status != "ok" or case.latency_ms is None:
            reason = case.check.reason or status(case)
            ended = reason if reason.endswith(".") else f"{reason}."
            lines.append(" ".join(filter(None, (f"{name(case)}: {ended}", _REMEDIES.get(status(case))))))
    return lines


def _about(run: Run) -> Iterator[str]:
    """Yield what the numbers are, what was checked, and what they are compared with."""
    timed = [case for case in run.cases if case.latency_ms]
    intervals = any(case.latency_ms and case.latency_ms.ci95 for case in timed)
    parts = ["Median and 95 % interval." if intervals else "Medians."] if timed else []
    checked = [case for case in run.cases if case.check.status in ("ok", "wrong", "doubtful")]
    right = sum(case.check.status != "wrong" for case in checked)
    if checked:
        outputs = "All outputs match" if right == len(checked) else f"{right} of {len(checked)} outputs match"
        parts.append(f"{outputs} float64.")
    if layers := {case.layers for case in run.cases if case.layers > 1}:
        parts.append(f"Numbers are per layer of {max(layers)}.")
    bases = filter(None, map(baseline, by_scenario(run.cases).values()))
    if names := dict.fromkeys(base.implementation for base in bases):
        parts.append(f"Speedup over {', '.join(names)}.")
    if shares := any(case.roofline.fraction is not None for case in timed):
        parts.append(ceilings.peaks(run.ceilings))
    yield " ".join(filter(None, parts))
    if shares and (ours := ceilings.of_our_own(run.ceilings)):
        plural = " and " in ours
        peak = f"{ours} {'peaks are those' if plural else 'peak is that'}"
        yield f"Caveat: the {peak} of the kernel under test; nothing else is faster."


def _wrapped(*paragraphs: str) -> list[str]:
    """Return paragraphs in lines of at most the width of the result."""
    return [line for text in paragraphs for line in textwrap.wrap(text, width(), break_on_hyphens=False)]


def headlines(run: Run) -> list[str]:
    """Return one line per scenario for the first implementation that ran it."""
    return list(map(headline, leading(run)))


def leading(run: Run) -> list[Case]:
    """Return the case of the first implementation that ran, for every scenario."""
    return list(map(first_run, by_scenario(run.cases).values()))


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
    unit = "ms" if estimate is case.latency_ms else "tok/s"
    told = quoted(estimate.median, estimate.ci95, unit)
    few = f" ({why_unreliable(case)})" if why_unreliable(case) and estimate.ci95 is None else ""
    return f"{what} Latency{of}: {told}{few}" if unit == "ms" else f"Decode Throughput{of}: {told}{few}"


def unreliable_headlines(run: Run) -> list[str]:
    """Return the headlines that are not to be relied on."""
    return [headline(case) for case in leading(run) if why_unreliable(case)]


def _layers(case: Case) -> str:
    """Return a note that numbers are per layer, if several ran."""
    return f" per layer of {case.layers}" if case.layers > 1 else ""


def _interval(latency: Latency | None) -> str:
    return between(latency.ci95, latency.median, latency.ci95) if latency else "-"


def _spread(latency: Latency | None) -> str:
    return between((latency.p10, latency.p90), latency.median, latency.ci95) if latency else "-"


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
