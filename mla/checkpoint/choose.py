"""Choose among a checkpoint's attentions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from mla.checkpoint.errors import CheckpointError
from mla.checkpoint.facts import Facts
from mla.checkpoint.names import Location

# A layer's number, or "N.M" for attention M of a layer that has several.
Wanted = int | str | None
_WANTED = re.compile(r"([0-9]{1,6})(?:\.([0-9]{1,3}))?")


def choose(locations: Collection[Location], wanted: Wanted, facts: Facts, folder: str) -> Location:
    """Return the location of the wanted layer; None: of the only main layer. Raises `CheckpointError`."""
    _one_pattern(locations, folder)
    number, part = _parse(wanted, folder)
    layer = (
        _only_main(locations, facts, folder)
        if wanted is None
        else _numbered(locations, number, facts, folder)
    )
    parts = [location for location in locations if location.layer == layer]
    for location in parts:
        if location.part == part:
            return location
    raise CheckpointError(_which_part(parts, layer, part, folder))


def _one_pattern(locations: Collection[Location], folder: str) -> None:
    patterns = sorted({location.pattern for location in locations})
    if len(patterns) > 1:
        raise CheckpointError(
            f"checkpoint '{folder}' holds MLA attention weights under several names, '{patterns[0]}' and "
            f"'{patterns[1]}': it is unclear which are meant."
        )


def _parse(wanted: Wanted, folder: str) -> tuple[int | None, int | None]:
    if wanted is None:
        return None, None
    match = _WANTED.fullmatch(str(wanted))
    if not match:
        raise CheckpointError(
            f"checkpoint '{folder}' has no layer {wanted!r}: layers are numbers, such as 3, or 3.1 for the "
            "second attention of a layer."
        )
    return int(match[1]), int(match[2]) if match[2] else None


def _only_main(locations: Collection[Location], facts: Facts, folder: str) -> int | None:
    layers = {location.layer for location in locations}
    main = {layer for layer in layers if not facts.is_draft(layer)}
    if len(main) == 1:
        return main.pop()
    if main:
        raise CheckpointError(
            f"checkpoint '{folder}' holds layers {_listed(main)}: choose one with layer=N (--layer N)."
        )
    raise CheckpointError(
        f"checkpoint '{folder}' holds no main layer, only layers for multi-token prediction: "
        f"{_listed(layers)}. Ask for one by its number."
    )


def _numbered(locations: Collection[Location], number: int | None, facts: Facts, folder: str) -> int | None:
    """Return the stored number of layer `number`, which a folder of one layer may have lost or changed."""
    layers = {location.layer for location in locations}
    if number in layers:
        return number
    if layers == {None} or (layers == {0} and facts.layers == 1):
        return layers.pop()
    raise CheckpointError(
        f"checkpoint '{folder}' has no attention weights of layer {number}; it holds layers "
        f"{_listed(layers)}."
    )


def _which_part(parts: list[Location], layer: int | None, part: int | None, folder: str) -> str:
    there = f"layer {layer or 0} of checkpoint '{folder}'"
    if parts[0].part is None:
        return f"{there} has one attention, so there is no {layer or 0}.{part}."
    numbers = sorted(location.part or 0 for location in parts)
    choices = " or ".join(f"'{layer or 0}.{number}'" for number in numbers)
    return f"{there} has several attentions: choose one with layer={choices}."


def _listed(layers: Iterable[int | None]) -> str:
    """Return "0, 1" or "0-60, 62"; three or more in a row become a range."""
    runs: list[list[int]] = []
    for layer in sorted(layer or 0 for layer in layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(words)
