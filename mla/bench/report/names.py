"""Short names for files and configs that are known by their paths. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SEPARATOR = re.compile(r"[/\\]+")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return for every path its last part, and as many folders before it as tell it from the others.

    Folders that tell nothing are left out: "old/…/run.json" and "new/…/run.json". Different paths have
    different names.
    """
    parts = {path: _parts(path) for path in paths}
    names = {path: _elided(_suffix(path, parts)) for path in parts}
    for path, name in names.items():
        if list(names.values()).count(name) > 1:
            names[path] = "/".join(_suffix(path, parts))
    taken = list(names.values())
    return {path: name if taken.count(name) == 1 else path for path, name in names.items()}


def _parts(path: str) -> list[str]:
    return [part for part in _SEPARATOR.split(path) if part not in ("", ".")] or [path]


def _suffix(path: str, parts: dict[str, list[str]]) -> list[str]:
    """Return the shortest end of a path that no other path has."""
    own, others = parts[path], [other for key, other in parts.items() if key != path]
    for length in range(1, len(own)):
        if all(other[-length:] != own[-length:] for other in others):
            return own[-length:]
    return own


def _elided(suffix: list[str]) -> str:
    return "/".join(suffix if len(suffix) < 3 else [suffix[0], "…", suffix[-1]])


def config_names(names: Iterable[str]) -> dict[str, str]:
    """Return short names of configs; one that was read from a file goes without its extension."""
    short = short_names(names)
    bare = {name: text.removesuffix(".json") for name, text in short.items()}
    taken = list(bare.values())
    return {name: text if taken.count(text) == 1 else short[name] for name, text in bare.items()}


def slug(text: str) -> str:
    """Return text as the name of a file: lower-case letters, digits and hyphens, not too long."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "picture"
