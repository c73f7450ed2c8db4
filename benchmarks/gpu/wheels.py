#!/usr/bin/env python3
"""Compare the libraries of kernels, as published today, with what the adapters and their fakes assume.

\b
    python benchmarks/gpu/wheels.py                                all that have wheels, downloaded with pip
    python benchmarks/gpu/wheels.py flashinfer-python==0.6.18      one library, at a version
    python benchmarks/gpu/wheels.py --source FlashMLA=../FlashMLA  a checkout, wheel or archive
    python benchmarks/gpu/wheels.py --list

Signatures are read from source text by griffe (`pip install griffe`): nothing is imported, so neither a GPU
nor CUDA is needed.
stdout carries one sentence per difference; notes go to stderr. Exit codes: 0 no drift, 1 drift, 2 usage or
no network.
"""

from __future__ import annotations

import sys
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


def wanted(words: tuple[str, ...], places: tuple[str, ...]) -> list[tuple[Library, str, str]]:
    """Return library, requirement and place (a path, "" for the index). Raises `UsageError`."""
    pairs = [(place.partition("=")[0], place) for place in places]
    pairs += [(word.partition("==")[0], word) for word in words]
    if not pairs:
        pairs = [(library.name, library.name) for library in LIBRARIES if library.on_index]
    chosen = []
    for number, (name, word) in enumerate(pairs):
        place = word.partition("=")[2] if number < len(places) else ""
        if name not in BY_NAME:
            hint = did_you_mean(name, list(BY_NAME))
            raise UsageError(f"there is no library '{name}'.{hint} --list shows all.")
        if number < len(places) and not place:
            raise UsageError(f"--source takes NAME=PATH, not '{word}'.")
        if not place and not BY_NAME[name].on_index:
            raise UsageError(f"{name} has no wheel to download: give --source {name}=PATH.")
        chosen.append((BY_NAME[name], word, place))
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
@click.option("--list", "list_only", is_flag=True, help="List what is compared, and stop.")
def wheels(libraries: tuple[str, ...], places: tuple[str, ...], list_only: bool) -> int:
    """Carry out the command line."""
    if list_only:
        console.out(listing())
        return Exit.OK
    drifted = False
    for library, requirement, place in wanted(libraries, places):
        real = sources.given(Path(place), library.name) if place else sources.wheel(requirement)
        findings = compare(library, real)
        console.out("".join(f"{sentence}\n" for sentence in findings.drift))
        for note in findings.notes:
            console.note(f"note: {note}")
        console.note(f"{real.label}: {findings.checked} calls compared, {len(findings.drift)} differ")
        drifted |= bool(findings.drift)
    return Exit.REGRESSION if drifted else Exit.OK


if __name__ == "__main__":
    sys.exit(guarded(lambda: wheels(standalone_mode=False)))
