#!/usr/bin/env python3
"""Settle on one card what only a card can tell, section by section, the most valuable first.

\b
    benchmarks/gpu/campaign.sh                          all sections, with the nvidia backend
    benchmarks/gpu/campaign.sh --budget 30m             what fits into half an hour
    benchmarks/gpu/campaign.sh --only facts,standard    some sections
    benchmarks/gpu/campaign.sh --short                  for a machine that is lent for an hour
    benchmarks/gpu/campaign.sh --out DIR --again grid   a section once more
    benchmarks/gpu/campaign.sh --dry-run                every command with its limit
    benchmarks/gpu/campaign.sh --smoke --backend cpu    tiny sizes: try the campaign itself

Every step is a process with a time limit; one that fails does not stop the others. A second campaign in the
same folder keeps what is there and resumes what was cut short. stdout carries the table, which is also
written to table.md of the folder; stderr everything else.

\b
Exit codes: 0 nothing is wrong, 2 usage, 3 a step was refused, doubtful, crashed or timed out, 4 a wrong
result, 130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP (what was done is kept).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import click
import msgspec

from benchmarks.gpu import dry_run
from benchmarks.gpu.loop import Campaign
from benchmarks.gpu.record import Ledger, opened
from benchmarks.gpu.report import tables
from benchmarks.gpu.sections import first_hour, sections
from benchmarks.gpu.steps import Machine, Section
from mla.bench.workload.scenario import duration
from mla.command import console
from mla.command.exit_codes import Exit, guarded, interrupted
from mla.command.files import write_bytes
from mla.command.options import parsed_by
from mla.errors import UsageError, did_you_mean
from mla_backends.discovery import locate
from mla_backends.errors import BackendError, UnknownBackend, one_line
from mla_backends.known import GENERAL
from mla_backends.triton_ops.tuning import card_slug

BEGAN = time.monotonic()  # a budget is that of the whole process: setting up a device may be slow
HERE = Path(__file__).resolve().parent
FACTS_SECONDS = 120


def ask_machine(backend: str) -> Machine:
    """Return what a child process finds out about the device."""
    command = [sys.executable, str(HERE / "facts.py"), backend]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=FACTS_SECONDS,
            check=False,
        )  # fmt: skip
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=Machine)
    except subprocess.TimeoutExpired:
        return Machine(backend, reason=f"setting up the device took more than {FACTS_SECONDS} s")
    except (IndexError, msgspec.DecodeError):
        last = one_line(done.stderr.strip().splitlines()[-1]) if done.stderr.strip() else "it said nothing"
        return Machine(backend, reason=f"setting up the device ended with code {done.returncode}: {last}")


def check_backend(name: str) -> None:
    """Raise `UsageError` for a backend that has no plugin: a known one may be missing on this host."""
    if name == GENERAL:
        raise UsageError(
            f"backend '{name}' has no kernels to settle anything about: run "
            f"`python -m mla.bench --backend {name} -O device=NAME` instead."
        )
    try:
        locate(name)
    except UnknownBackend as error:
        raise UsageError(str(error)) from error
    except BackendError:  # not installed here: --dry-run shows what would run
        return


def chosen(every: Sequence[Section], names: str | None) -> list[Section]:
    """Return the sections that --only or --again names; all without names. Raises `UsageError`."""
    by_name = {section.name: section for section in every}
    if names is None:
        return list(every)
    words = [word.strip() for word in names.split(",") if word.strip()]
    for word in words:
        if word not in by_name:
            hint = did_you_mean(word, list(by_name))
            raise UsageError(f"there is no section '{word}'.{hint} Sections: {', '.join(by_name)}.")
    return [section for section in every if section.name in words]


def verdict(ledger: Ledger, wanted: Sequence[Section]) -> int:
    """Return the exit code for the sections of this command."""
    names = {section.name for section in wanted}
    failed = {one.verdict for one in ledger.records if one.section in names and one.failed}
    if failed:
        return Exit.WRONG if "wrong" in failed else Exit.BACKEND
    ran = any(one.section in names and one.verdict != "skipped" for one in ledger.records)
    return Exit.OK if ran else Exit.NOTHING_RAN


def pack(folder: Path, place: Path) -> None:
    """Leave an archive of a folder and its table in another, each whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    part = shutil.make_archive(str(place / "part"), "gztar", folder.parent, folder.name)
    os.replace(part, place / f"{folder.name}.tgz")
    write_bytes((folder / "table.md").read_bytes(), place / "table.md")
    console.note(f"what is to be taken away is in {place}")


def carry_out(
    machine: Machine, every: Sequence[Section], wanted: list[Section], again: list[Section],
    folder: Path, smoke: bool, budget: float | None, place: Path | None = None,
) -> int:  # fmt: skip
    """Walk through the wanted sections, and leave the table of every section whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger = opened(folder, machine, smoke)
    campaign = Campaign(machine, folder, ledger, budget)
    campaign.forget(section.name for section in again)
    code: int | None = None
    try:
        campaign.walk(wanted)
    except KeyboardInterrupt:
        code = interrupted()
    finally:
        try:
            report = tables.Report(ledger, folder, every)
            write_bytes(report.markdown().encode(), folder / "table.md")
        finally:
            if place:
                pack(folder, place)
    console.out(report.plain())
    console.note(f"\n{report.left()}")
    kept = sum(one.kept and one.final for one in ledger.records)
    console.note(f"results are in {folder}; to go on: campaign.sh --backend {machine.backend} --out {folder}")
    if kept:
        console.note(f"{kept} steps were kept from an earlier campaign; --again SECTION repeats a section")
    return verdict(ledger, wanted) if code is None else code


@click.command(help=__doc__)
@click.option("--backend", default="nvidia", show_default=True, help="Backend to measure.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.  [campaign-CARD-DATE]")
@click.option("--only", metavar="A,B", help="Run only these sections.")
@click.option("--short", is_flag=True, help="The sections of the first hour, in its order.")
@click.option("--again", metavar="A,B", help="Drop what is there of these sections, and run them again.")
@click.option("--budget", metavar="TIME", callback=parsed_by(duration), help="Stay within this time (30m).")
@click.option("--pack", "place", type=click.Path(path_type=Path), help="Leave table and archive here, too.")
@click.option("--list", "list_only", is_flag=True, help="List the sections with their limits, and stop.")
@click.option("--dry-run", "dry", is_flag=True, help="Print and check every command, and stop.")
@click.option("--smoke", is_flag=True, help="Tiny sizes: try the campaign itself.")
def campaign(
    backend: str, out: Path | None, only: str | None, short: bool, again: str | None, budget: float | None,
    place: Path | None, list_only: bool, dry: bool, smoke: bool,
) -> int:  # fmt: skip
    """Carry out the command line."""
    check_backend(backend)
    plan = first_hour if short else sections
    every = plan(Machine(backend), smoke)
    chosen(every, only), chosen(every, again)  # a wrong name is said at once
    if list_only:
        console.out(tables.listing(every))
        return Exit.OK
    machine = ask_machine(backend)
    every = plan(machine, smoke)
    wanted = chosen(every, only)
    folder = out or Path(f"campaign-{card_slug(machine.card)}-{time.strftime('%Y-%m-%d')}")
    if dry:
        if not machine.usable:
            console.note(f"not usable here, so options are parsed only: {machine.reason}")
        return Exit.USAGE if dry_run.dry_run(machine, wanted, folder) else Exit.OK
    repeated = chosen(every, again) if again else []
    left = None if budget is None else budget - (time.monotonic() - BEGAN)
    return carry_out(machine, every, wanted, repeated, folder, smoke, left, place)


if __name__ == "__main__":
    sys.exit(guarded(lambda: campaign(standalone_mode=False)))
