#!/usr/bin/env python3
"""Compare the libraries of kernels, as published today, with what the adapters and their fakes assume.

\b
    python benchmarks/gpu/wheels.py                                all that have wheels, downloaded with pip
    python benchmarks/gpu/wheels.py flashinfer-python==0.6.18      one library, at a version
    python benchmarks/gpu/wheels.py --source FlashMLA=../FlashMLA  a checkout, wheel or archive
    python benchmarks/gpu/wheels.py --list

Signatures are read from source text: nothing is installed or imported, so neither a GPU nor CUDA is needed.
stdout carries one sentence per difference; notes go to stderr. Exit codes: 0 no drift, 1 drift, 2 usage or
no network.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import click

from benchmarks.gpu.drift import sources
from benchmarks.gpu.drift.catalog import LIBRARIES, Library
from benchmarks.gpu.drift.compare import compare
from mla.command import console
from mla.command.exit_codes import Exit, guarded
from mla.errors import UsageError, did_you_mean

BY_NAME = {library.name: library for library in LIBRARIES}


def known(name: str) -> Library:
    """Return a library by name. Raises `UsageError`."""
    if name not in BY_NAME:
        raise UsageError(
            f"there is no library '{name}'.{did_you_mean(name, list(BY_NAME))} --list shows all."
        )
    return BY_NAME[name]


def wanted(words: tuple[str, ...], places: tuple[str, ...]) -> list[tuple[Library, str, str]]:
    """Return library, requirement and place (a path, "" for the index). Raises `UsageError`."""
    chosen = []
    for word in places:
        name, equals, place = word.partition("=")
        if not equals or not place:
            raise UsageError(f"--source takes NAME=PATH, not '{word}'.")
        chosen.append((known(name), name, place))
    if not words and not places:
        words = tuple(library.name for library in LIBRARIES if library.on_index)
    for word in words:
        library = known(word.partition("==")[0])
        if not library.on_index:
            raise UsageError(f"{library.name} has no wheel to download: give --source {library.name}=PATH.")
        chosen.append((library, word, ""))
    return chosen


def listing() -> str:
    """Return what is compared."""
    lines = []
    for library in LIBRARIES:
        how = "" if library.on_index else " (with --source only)"
        lines += [f"{library.name}{how}: {call.module}.{call.function}\n" for call in library.calls]
    return "".join(lines)


@click.command(help=__doc__)
@click.argument("libraries", nargs=-1, metavar="[NAME[==VERSION]]...")
@click.option("--source", "places", multiple=True, metavar="NAME=PATH", help="Sources of a library.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder for downloads.")
@click.option("--list", "list_only", is_flag=True, help="List what is compared, and stop.")
def wheels(libraries: tuple[str, ...], places: tuple[str, ...], keep: Path | None, list_only: bool) -> int:
    """Carry out the command line."""
    if list_only:
        console.out(listing())
        return Exit.OK
    chosen, drifted = wanted(libraries, places), False
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for library, requirement, place in chosen:
            real = sources.source(library.name, place) if place else sources.wheel(requirement, folder)
            findings = compare(library, real)
            console.out("".join(f"{sentence}\n" for sentence in findings.drift))
            for note in findings.notes:
                console.note(f"note: {note}")
            console.note(f"{real.label}: {findings.checked} calls compared, {len(findings.drift)} differ")
            drifted |= bool(findings.drift)
    return Exit.REGRESSION if drifted else Exit.OK


if __name__ == "__main__":
    sys.exit(guarded(lambda: wheels(standalone_mode=False)))
