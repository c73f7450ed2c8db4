"""Finding backends in the metadata of what is installed. Nothing here imports a plugin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

from mla_backends.errors import BackendNotInstalled, DuplicateBackend, NoPlugin, UnknownBackend
from mla_backends.known import GENERAL, KNOWN, WITHOUT_PLUGIN

GROUP = "mla.backends"
DISTRIBUTION = "mla-backends"


@dataclass(frozen=True)
class Entry:
    """One backend on offer: an entry point, or code the user pointed at (then without a distribution)."""

    name: str
    distribution: str | None
    version: str | None
    value: str  # "package.module" or "package.module:attribute"

    @property
    def origin(self) -> str:
        """Name the code for messages: the distribution and its version, or the module."""
        if self.distribution is None:
            return f"module {self.value.partition(':')[0]}"
        return f"{self.distribution} {self.version}"


def entries() -> list[Entry]:
    """List the backends on offer, sorted by name.

    A name may occur twice, from different distributions. One distribution found twice on `sys.path`
    (an editable install seen from its own folder) counts once; the first on the path wins, as for imports.
    """
    entries: dict[tuple[str, str], Entry] = {}
    for point in metadata.entry_points(group=GROUP):
        distribution, version = _identity(point)
        entry = Entry(point.name, distribution, version, point.value)
        key = (point.name, re.sub(r"[-_.]+", "-", distribution).lower())  # normalised as PEP 503 does
        entries.setdefault(key, entry)
    return sorted(entries.values(), key=lambda entry: (entry.name, entry.distribution or ""))


def locate(name: str) -> Entry:
    """Return the one entry called `name`, or the code that `package.module:attribute` points at.

    Raises `UnknownBackend`, `BackendNotInstalled`, `NoPlugin` or `DuplicateBackend`.
    """
    if ":" in name:
        return Entry(name, None, None, name)
    offers = entries()
    chosen = [entry for entry in (*offers, general()) if entry.name == name]
    if len(chosen) > 1:
        raise DuplicateBackend(name, [(entry.distribution or "?", entry.version or "?") for entry in chosen])
    if chosen:
        return chosen[0]
    if name in KNOWN:
        raise BackendNotInstalled(KNOWN[name])
    if name in WITHOUT_PLUGIN:
        raise NoPlugin(WITHOUT_PLUGIN[name])
    raise UnknownBackend(name, sorted({entry.name for entry in offers}), KNOWN)


def general() -> Entry:
    """Return the backend of this package itself, which needs no metadata."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "?"
    return Entry(GENERAL, DISTRIBUTION, version, "mla_backends.any_device")


def _identity(point: metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution that declares `point`.

    A half-removed installation may lack them; it must not hide all other backends.
    """
    try:
        if point.dist is not None and point.dist.name:
            return point.dist.name, point.dist.version
    except (KeyError, OSError):
        pass  # Python 3.10 to 3.12 say None where METADATA is missing, later ones may raise
    return "(unnamed distribution)", "?"
