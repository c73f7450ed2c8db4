"""`export`: result files in the formats of other tools."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from mla.bench import results
from mla.bench.results import infinimetrics
from mla.bench.results.rows import as_csv, timing_rows
from mla.bench.results.schema import Run
from mla.command import files
from mla.command.console import note, out
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word
from mla.errors import ResultError, UsageError

Files = Sequence[tuple[Path, Run]]

TABLE = files.Kind("a table of results", lambda data: data.startswith(as_csv(()).encode()))
DOCUMENT = files.Kind("a document of a case", lambda data: infinimetrics.START.match(data) is not None)


@click.command(short_help="Write results as CSV or for InfiniMetrics; torch is not needed.")
@click.argument("runs", cls=Word, type=FILE, nargs=-1, required=True, help="Result files (-o).")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["csv", "infinimetrics"]),
    default="csv",
    show_default=True,
    help="csv: one table, a row for every way in which a case was timed. infinimetrics: a JSON document per "
    "case, as its importer and dashboard read them.",
)
@click.option(
    "-o",
    "--output",
    "target",
    metavar="FILE|DIR",
    type=FILE,
    help="Where to write it instead of stdout. infinimetrics: a folder that gets a file per case, or "
    "FILE.json for a single one.",
)
def export(runs: tuple[Path, ...], kind: str, target: Path | None) -> int:
    """Write result files in a format that other tools read.

    A case that is wrong or doubtful keeps its row or its document, with the reason and without any number.
    On stdout, InfiniMetrics documents are JSON Lines.

    Exit code 0; 2 for a file that is not a result, or that cannot be written; 5 if there is no case.
    """
    _check_inputs(runs)
    read = [(path, results.read(path)) for path in runs]
    if target is not None:
        _check_target(target, runs)
    states = Counter(case.check.status for _, run in read for case in run.cases)
    if not states:
        note("nothing to export: no case in " + ", ".join(map(str, runs)))
        return Exit.NOTHING_RAN
    wrote = (_csv if kind == "csv" else _infinimetrics)(read, target)
    missing = ", ".join(f"{count} {state}" for state, count in states.items() if state != "ok")
    without = f"; without a number: {missing}" if missing else ""
    note(f"exported {wrote} of {_count(states.total(), 'case')} in {_count(len(read), 'file')}{without}")
    return Exit.OK


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _check_inputs(inputs: Sequence[Path]) -> None:
    """Raise `UsageError` for a file that is given twice: its cases would be two measurements each."""
    seen = Counter(path.resolve() for path in inputs)
    twice = next((path for path in inputs if seen[path.resolve()] > 1), None)
    if twice is not None:
        raise UsageError(f"'{twice}' is given twice: name every result file once.")


def _check_target(target: Path, inputs: Sequence[Path]) -> None:
    """Raise `ResultError` for a result file that would be overwritten."""
    if target.exists() and any(path.samefile(target) for path in inputs):
        raise ResultError(f"cannot write '{target}': it is one of the result files; name another file.")


def _csv(read: Files, target: Path | None) -> str:
    rows = timing_rows(read)
    text = as_csv(rows)
    if target is None:
        out(text)
    else:
        files.check_writable(target, TABLE)
        files.write_bytes(text.encode("utf-8", "replace"), target)
    return _count(len(rows), "row")


def _infinimetrics(read: Files, target: Path | None) -> str:
    documents = [document for _, run in read for document in infinimetrics.documents(run)]
    said = _count(len(documents), "document")
    if target is None or files.is_stream(target):
        lines = "".join(f"{json.dumps(document)}\n" for document in documents)
        out(lines) if target is None else files.write_bytes(lines.encode(), target)
        return said
    if target.suffix == ".json" and not target.is_dir():
        if len(documents) != 1:
            raise UsageError(
                f"InfiniMetrics reads one result per file, and these are {len(documents)}: give -o a folder, "
                f"such as -o {target.with_suffix('')}."
            )
        targets = [target]
    else:
        _make_folder(target)
        targets = [target / infinimetrics.file_name(document) for document in documents]
    for path in targets:
        files.check_writable(path, DOCUMENT)
    for document, path in zip(documents, targets, strict=True):
        files.write_bytes(json.dumps(document, indent=1).encode() + b"\n", path)
    return said


def _make_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ResultError(f"cannot make the folder '{path}': there is no folder '{path.parent}'.")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot make the folder '{path}': {error.strerror}.") from error
