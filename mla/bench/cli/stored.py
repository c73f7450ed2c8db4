"""Commands about result files: `compare`, `show`, `export`, `report`. None needs torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from mla.bench import results
from mla.bench.results import infinimetrics
from mla.bench.results.compare import REFUSED, Comparison
from mla.bench.results.file import decode_any
from mla.bench.results.rows import as_csv, timing_rows
from mla.bench.results.schema import Run
from mla.bench.terminal import ceilings, run_table
from mla.bench.terminal.tables import compared
from mla.bench.workload.scenario import repeated
from mla.command import files
from mla.command.console import note, out
from mla.command.exit_codes import Exit
from mla.command.options import DETAIL, FILE, Read, Word, add_options, format_option, percent
from mla.errors import UsageError
from mla.text import counted, size

Files = Sequence[tuple[Path, Run]]

TABLE = files.Kind("a table of results", lambda data: data.startswith(as_csv(()).encode()))
DOCUMENT = files.Kind("a document of a case", lambda data: infinimetrics.START.match(data) is not None)


@click.command(short_help="Compare result files with the first one.")
@click.argument("base", cls=Word, type=FILE, help="Result file (-o) that the others are compared with.")
@click.argument("runs", cls=Word, type=FILE, nargs=-1, required=True, help="Result files to compare.")
@click.option(
    "--noise", type=Read(percent), default="2%", show_default=True, help="What counts as the same."
)  # fmt: skip
@click.option(
    "--fail-slower", type=Read(percent), metavar="PERCENT",
    help="Exit 1 if the whole interval of a case's time ratio lies above this.",
)  # fmt: skip
@format_option(["table", "md"], "Format of what is printed; md for a pull request.")
def compare(base: Path, runs: tuple[Path, ...], noise: float, fail_slower: float | None, kind: str) -> int:
    """Say for every case whether it is FASTER, SLOWER, the SAME or UNDECIDED against the base run.

    Milliseconds and their intervals are those that the runs print. Verdicts come from the interval of the
    ratio of times, never from a single number. Cases whose workload, config, dtype or clock differ, that have
    no number in one of the runs, or that only one of them has are REFUSED, with the reason; other differences
    are named. A run and a copy of it are not compared. Where the base is of one device and another result of
    several ranks, notes say how cases scale.

    Exit code 0; 1 with --fail-slower and a case whose whole interval is slower, or one that the base has a
    number for and that was not compared; 2 for a file that is not a result; 4 if a case turned wrong or a
    new one is; 5 if nothing could be compared; 6 if a case turned suspect or a new one is.
    """
    first, *others = [results.read(path) for path in (base, *runs)]
    cases: list[Comparison] = []
    text = ""
    for path, run in zip(runs, others, strict=True):
        if run == first:
            what = "is compared with itself" if path == base else f"holds the same run as {base}"
            text += f"{path} {what}: there is nothing to compare\n"
            continue
        table, comparisons = compared(first, run, f"{path} against {base}", noise)
        text += table.text(kind)
        cases += comparisons
    out(text)
    return Exit.OK if all(run == first for run in others) else verdict(cases, fail_slower)


def verdict(cases: Sequence[Comparison], limit: float | None, *, selected: bool = False) -> Exit:
    """Return the exit code, and say on stderr why it is not 0.

    With a `limit` this is a gate: what the base has a number for must not get out of it by being wrong,
    doubtful, missing or something else. If the new run `selected` its cases, others may be missing. A
    baseline that nobody asked for closes no gate.
    """
    judged = [case for case in cases if not case.added]
    order = (Exit.WRONG, Exit.REGRESSION, Exit.DOUBTFUL)
    faults = [fault for case in judged for fault in _faults(case, limit, selected)]
    faults.sort(key=lambda fault: order.index(fault[0]))
    for _, line in faults:
        note(line)
    if all(case.verdict == REFUSED for case in cases) and {code for code, _ in faults} <= {Exit.REGRESSION}:
        note("nothing could be compared: time the same cases in both runs, with the same options")
        return Exit.NOTHING_RAN
    if not faults and limit is not None and not any(case.interval for case in judged):
        note("no case has an interval, so the gate cannot decide: time at least 6 passes")
        return Exit.NOTHING_RAN
    return faults[0][0] if faults else Exit.OK


def _faults(case: Comparison, limit: float | None, selected: bool) -> Iterator[tuple[Exit, str]]:
    """Yield that a case turned wrong or doubtful, or is new and so, and why it closes the gate."""
    name, states = f"{case.scenario}, {case.implementation}", {"wrong": Exit.WRONG, "doubtful": Exit.DOUBTFUL}
    if case.status in states and (case.expected or case.base is None):
        yield states[case.status], f"{case.status} result: {name} has no number"
    if limit is None:
        return
    if case.slower_than(limit):
        times = f"takes {case.ratio:.3f} times as long"
        if case.passes is not None and not (case.interval and case.interval[0] > 1 + limit):
            times = f"takes at least {case.passes[0]:.3f} times as long in whole passes"
        yield Exit.REGRESSION, f"regression: {name} {times}"
    lost = case.verdict == REFUSED and case.expected and case.status not in states
    if lost and not (selected and case.status == "missing"):
        yield Exit.REGRESSION, f"not compared: {name}: {case.reason}"


@click.command(short_help="Print a stored run again.")
@click.argument("run", cls=Word, type=FILE, help="Result file (-o).")
@format_option(run_table.FORMATS, "Format of what is printed.")
@add_options(DETAIL)
def show(run: Path, kind: str, detail: run_table.Detail | None) -> int:
    """Print a run from its result file, in any format."""
    out(stored(run, kind, detail or "short"))
    return Exit.OK


def stored(path: Path, kind: str, detail: run_table.Detail = "short") -> str:
    """Return a stored run, or what `ceilings` stored, as it was printed. Raises `ResultError`."""
    run = results.decoded(results.content(path), path, decode_any)
    return run_table.render(run, kind, detail) if isinstance(run, Run) else ceilings.render(run, kind)


@click.command(short_help="Export results as CSV, or for InfiniMetrics.")
@click.argument("runs", cls=Word, type=FILE, nargs=-1, required=True, help="Result files (-o).")
@format_option(
    ["csv", "infinimetrics"],
    "csv: one table, a row for each timing variant of a case. infinimetrics: a JSON document per "
    "case, as its importer and dashboard read them.",
)
@click.option(
    "-o", "--output", "target", metavar="FILE|DIR", type=FILE,
    help="Where to write it instead of stdout. infinimetrics: a folder that gets a file per case, or "
    "FILE.json for a single one.",
)  # fmt: skip
def export(runs: tuple[Path, ...], kind: str, target: Path | None) -> int:
    """Write result files in a format that other tools read.

    A wrong or suspect case keeps its row or its document, with the reason and without any number.
    On stdout, InfiniMetrics documents are JSON Lines.

    Exit code 0; 2 for a file that is not a result, or that cannot be written; 5 if there is no case.
    """
    if twice := repeated(path.resolve() for path in runs):  # two measurements of each case
        name = next(path for path in runs if path.resolve() == twice)
        raise UsageError(f"'{name}' is given twice: name every result file once.")
    read = [(path, results.read(path)) for path in runs]
    if target is not None:
        files.check_not_input(target, runs)
    states = Counter(case.check.status for _, run in read for case in run.cases)
    if not states:
        note("nothing to export: no case in " + ", ".join(map(str, runs)))
        return Exit.NOTHING_RAN
    wrote = (_csv if kind == "csv" else _infinimetrics)(read, target)
    missing = ", ".join(f"{count} {state}" for state, count in states.items() if state != "ok")
    without = f"; without a number: {missing}" if missing else ""
    note(f"exported {wrote} of {counted(states.total(), 'case')} in {counted(len(read), 'file')}{without}")
    return Exit.OK


def _csv(read: Files, target: Path | None) -> str:
    rows = timing_rows(read)
    text = as_csv(rows)
    if target is None:
        out(text)
    else:
        files.check_writable(target, TABLE)
        files.write_bytes(text.encode("utf-8", "replace"), target)
    return counted(len(rows), "row")


def _infinimetrics(read: Files, target: Path | None) -> str:
    documents = [document for _, run in read for document in infinimetrics.documents(run)]
    said = counted(len(documents), "document")
    if target is None or files.is_stream(target):
        lines = "".join(f"{json.dumps(document)}\n" for document in documents)
        out(lines) if target is None else files.write_bytes(lines.encode(), target)
        return said
    if target.suffix != ".json" or target.is_dir():
        files.make_folder(target)
        targets = [target / infinimetrics.file_name(document) for document in documents]
    elif len(documents) == 1:
        targets = [target]
    else:
        raise UsageError(
            f"InfiniMetrics reads one result per file, and these are {len(documents)}: give -o a folder, "
            f"such as -o {target.with_suffix('')}."
        )
    for path in targets:
        files.check_writable(path, DOCUMENT)
    for document, path in zip(documents, targets, strict=True):
        files.write_bytes(json.dumps(document, indent=1).encode() + b"\n", path)
    return said


# ---------------------------------------------------------------------------------------------------- report


@click.command(short_help="Draw an HTML page, or pictures, of result files.")
@click.argument(
    "runs", cls=Word, type=FILE, nargs=-1, required=True,
    help="Result files (-o); the others are compared with the first.",
)  # fmt: skip
@click.option(
    "-o", "--html", "target", metavar="FILE", type=FILE,
    help="The page to write (default, without --pictures: the first result file's name with .html).",
)  # fmt: skip
@click.option(
    "--pictures", "folder", metavar="FOLDER", type=FILE,
    help="Write every chart as an SVG file of its own, for light and for dark backgrounds.",
)  # fmt: skip
def report(runs: tuple[Path, ...], target: Path | None, folder: Path | None) -> int:
    """Write tables, plots, environment and method of result files into one page that opens offline.

    The page has no script and loads nothing. An earlier page is overwritten, any other file is not; the same
    holds for pictures, which are for slides and documents.
    Needs matplotlib and jinja2: in a checkout, pip install '.[report]' ./backends (once released,
    pip install 'mla-bench[report]').

    \b
      mla-bench report run.json   # writes run.html
      mla-bench report before.json after.json -o report.html
      mla-bench report before.json after.json --pictures pictures

    Exit code 0; 2 for a file that is not a result, a page that cannot be written, or missing libraries.
    """
    if target is None and folder is None:
        if files.is_stream(runs[0]):
            raise click.UsageError("Missing option '-o' (a page) or '--pictures' (a folder of charts).")
        target = runs[0].parent / f"{runs[0].stem}.html"
    try:
        from mla.bench.report import page  # for which no other command is to wait
    except ImportError as error:
        raise UsageError(
            f"a report needs matplotlib and jinja2, and one cannot be imported ({error}): "
            "`pip install matplotlib jinja2`, or in a checkout `pip install '.[report]' ./backends`."
        ) from error
    if target is not None:
        files.check_not_input(target, runs)
        files.check_writable(target, page.PAGE)
    read = [results.read(path) for path in runs]
    names = [str(path) for path in runs]
    said = f"{sum(len(run.cases) for run in read)} cases of {counted(len(read), 'file')}"
    if folder is not None:
        made = page.pictures(names, read)
        page.write_pictures(made, folder)
        note(f"wrote {len(made)} pictures into {folder}: {said}")
    if target is not None:
        text = page.render(names, read).encode("utf-8", "replace")
        files.write_bytes(text, target)
        note(f"wrote {target}: {said}, {size(len(text), unit='KiB', style='.0f')}")
    return Exit.OK
