"""The file that `ceilings` writes: what was measured, and what the backend declares. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from mla.bench.results.schema import BackendFacts, Ceiling
from mla.errors import ResultError

SCHEMA_VERSION = 1


class CeilingRun(msgspec.Struct, kw_only=True):
    """One invocation of `ceilings`."""

    report: Literal["ceilings"]
    schema_version: int
    argv: list[str]
    created: str  # ISO 8601, UTC
    git_commit: str | None
    backend: BackendFacts
    environment: dict[str, str]
    measured: list[Ceiling]
    declared: list[Ceiling]  # the backend's own peaks, with where they are published
    interrupted: bool = False

    def fraction(self, found: Ceiling) -> float | None:
        """Return a measured ceiling over the declared one; None where they are not of the same thing.

        Bandwidths are declared for memory, so what fits the last-level cache is not compared.
        """
        if found.work != "matmul" and (found.footprint_bytes or 0) <= (self.backend.cache_bytes or 0):
            return None
        kind = ("matmul", found.dtype) if found.work == "matmul" else ("read", None)
        peak = next((one for one in self.declared if (one.work, one.dtype) == kind), None)
        return found.value / peak.value if peak else None


class _Head(msgspec.Struct):
    report: str = ""
    schema_version: int = 0


def is_ceilings(path: Path) -> bool:
    """Say whether a file claims to be one of `ceilings`; other results, and what cannot be read, do not."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Head).report == "ceilings"
    except (OSError, msgspec.DecodeError):
        return False


def decode(data: bytes) -> CeilingRun:
    """Parse and validate. Raises `ResultError` with the JSON path of the fault."""
    try:
        version = msgspec.json.decode(data, type=_Head).schema_version
        if version > SCHEMA_VERSION:
            raise ResultError(
                f"a file of ceilings of schema version {version}, and this mla reads up to {SCHEMA_VERSION}: "
                "use the mla that wrote it, or a newer one."
            )
        return msgspec.json.decode(data, type=CeilingRun)
    except msgspec.DecodeError as error:
        raise ResultError(f"not a file of ceilings: {error}.") from error


def read(path: Path) -> CeilingRun:
    """Read a file of ceilings. Raises `ResultError` naming the file and the cause."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ResultError(f"cannot read '{path}': {error.strerror}.") from error
    except ResultError as error:
        raise ResultError(f"'{path}' is {error}") from error
