"""The distributions of this repository: where they are, what they are called, and their one version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Distribution:
    """One folder with a pyproject.toml."""

    name: str
    folder: Path

    @property
    def stem(self) -> str:
        """The name as files of wheels and sdists spell it."""
        return self.name.replace("-", "_")


def distributions() -> list[Distribution]:
    """Return all of them: the core, the contract, the plugins."""
    plugins = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
    return [Distribution(_field(folder, "name"), folder) for folder in (ROOT, ROOT / "backends", *plugins)]


def version() -> str:
    """Return the version that all distributions take from `mla/__init__.py`."""
    text = (ROOT / "mla" / "__init__.py").read_text(encoding="utf-8")
    return _only(re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE))


def readmes() -> Iterator[Path]:
    """Yield the page that an index shows for each distribution."""
    return (distribution.folder / "README.md" for distribution in distributions())


def _field(folder: Path, key: str) -> str:
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    return _only(re.findall(rf'^{key} = "(.+)"$', text.partition("[project]")[2], re.MULTILINE)[:1])


def _only(wheels: list[str]) -> str:
    (wheel,) = wheels
    return wheel
