"""`compare`: a verdict for every case of result files against a base run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mla.bench import results
from mla.bench.results.compare import REFUSED, Comparison, slower
from mla.bench.results.scaling import scaling
from mla.bench.terminal.comparison import compare_runs, scaling_tables
from mla.command.console import note, out
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word, parsed_by, percent


@click.command(short_help="Compare result files; torch is not needed.")
@click.argument("base", cls=Word, type=FILE, help="Result file (-o) that the others are compared with.")
@click.argument("runs", cls=Word, type=FILE, nargs=-1, required=True, help="Result files to compare.")
@click.option(
    "--noise", callback=parsed_by(percent), default="2%", show_default=True, help="What counts as the same."
)
@click.option(
    "--fail-slower",
    callback=parsed_by(percent),
    metavar="PERCENT",
    help="Exit 1 if the whole interval of a case's time ratio lies above this.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "md"]),
    default="table",
    show_default=True,
    help="Format of what is printed; md for a pull request.",
)
def compare(base: Path, runs: tuple[Path, ...], noise: float, fail_slower: float | None, kind: str) -> int:
    """Say for every case whether it is FASTER, SLOWER, the SAME or UNDECIDED against the base run.

    Milliseconds and their intervals are those that the runs print. Verdicts come from the interval of the
    ratio of times, never from a single number. Cases whose workload, config, dtype or clock differ, that have
    no number in one of the runs, or that only one of them has are REFUSED, with the reason; other differences
    are named. A run and a copy of it are not compared. Where one result is of one device and others are of
    several ranks, a table says how they scale.

    Exit code 0; 1 with --fail-slower and a case that is slower beyond doubt, or one that the base has a
    number for and that was not compared; 2 for a file that is not a result; 4 if a case turned wrong or a
    new one is; 5 if nothing could be compared; 6 if a case turned doubtful or a new one is.
    """
    first, *others = [results.read(path) for path in (base, *runs)]
    cases: list[Comparison] = []
    text = ""
    same = [run == first for run in others]
    for path, run, is_same in zip(runs, others, same, strict=True):
        if is_same:
            what = "is compared with itself" if path == base else f"holds the same run as {base}"
            text += f"{path} {what}: there is nothing to tell apart\n"
            continue
        printed, compared = compare_runs(first, run, f"{path} against {base}", kind, noise)
        text += printed
        cases += compared
    scaled = scaling_tables(scaling([first, *others]), kind)
    out(text + "\n" * bool(scaled) + scaled)
    return Exit.OK if all(same) else verdict(cases, fail_slower)


def verdict(cases: Sequence[Comparison], limit: float | None, *, selected: bool = False) -> Exit:
    """Return the exit code, and say on stderr why it is not 0.

    With a `limit` this is a gate: what the base has a number for must not get out of it by being wrong,
    doubtful, missing or something else. If the new run `selected` its cases, others may be missing.
    """
    wrong, doubtful = (_named(cases, status) for status in ("wrong", "doubtful"))
    red = _red(cases, limit, selected) if limit is not None else []
    for line in [*wrong, *red, *doubtful]:
        note(line)
    if wrong:
        return Exit.WRONG
    if not any(case.verdict != REFUSED for case in cases) and not doubtful:
        note("nothing could be compared")
        return Exit.NOTHING_RAN
    if red:
        return Exit.REGRESSION
    if doubtful:
        return Exit.DOUBTFUL
    if limit is not None and not any(case.judged for case in cases):
        note("no case has an interval, so none can be slower beyond doubt: time at least 6 passes")
        return Exit.NOTHING_RAN
    return Exit.OK


def _named(cases: Sequence[Comparison], status: str) -> list[str]:
    """Return a line for every case that turned wrong, or doubtful, or that is new and so."""
    return [
        f"{status} result: {case.scenario}, {case.implementation} has no number"
        for case in cases
        if case.status == status and (case.expected or not case.known)
    ]


def _red(cases: Sequence[Comparison], limit: float, selected: bool) -> list[str]:
    """Return why a gate is closed: what is slower, and what could not be compared."""
    found = []
    for case in slower(cases, limit):
        times = f"takes {case.ratio:.3f} times as long"
        if case.passes is not None and not (case.interval and case.interval[0] > 1 + limit):
            times = f"takes at least {case.passes[0]:.3f} times as long in whole passes"
        found.append(f"regression: {case.scenario}, {case.implementation} {times}")
    for case in cases:
        lost = case.verdict == REFUSED and case.expected and case.status not in ("wrong", "doubtful")
        if lost and not (selected and case.status == "missing"):
            found.append(f"not compared: {case.scenario}, {case.implementation}: {case.reason}")
    return found
