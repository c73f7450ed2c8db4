"""The file that `ceilings` writes: measured ceilings and declared peaks. Needs no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from mla.bench.results.file import check_version, parsed
from mla.bench.results.printable import printable
from mla.bench.results.schema import BackendFacts, Ceiling, Positive
from mla.bench.results.validity import fault_of_ceilings
from mla.errors import ResultError

SCHEMA_VERSION = 1


class CeilingRun(msgspec.Struct, kw_only=True):
    """One invocation of `ceilings`."""

    report: Literal["ceilings"]
    schema_version: Positive
    argv: list[str]
    created: str  # ISO 8601, UTC
    git_commit: str | None
    backend: BackendFacts
    environment: dict[str, str]
    measured: list[Ceiling]
    declared: list[Ceiling]  # the backend's own peaks, with the source they are published in
    interrupted: bool = False

    def fraction(self, ceiling: Ceiling) -> float | None:
        """Return a measured ceiling over the declared peak of the same work; None if there is none.

        Bandwidths are declared for memory, so a footprint that fits the last-level cache has none.
        """
        if ceiling.work != "matmul" and (ceiling.footprint_bytes or 0) <= (self.backend.cache_bytes or 0):
            return None
        kind = ("matmul", ceiling.dtype) if ceiling.work == "matmul" else ("read", None)
        peak = next((peak for peak in self.declared if (peak.work, peak.dtype) == kind), None)
        return ceiling.value / peak.value if peak else None


class _Head(msgspec.Struct):
    report: str = ""
    schema_version: int = 0


def is_ceilings(data: bytes) -> bool:
    """Return whether a file says it was written by `ceilings`; False for what is no JSON."""
    try:
        return msgspec.json.decode(data, type=_Head).report == "ceilings"
    except (ValueError, RecursionError):  # decoding says what is wrong
        return False


def decode(data: bytes) -> CeilingRun:
    """Parse and validate a ceilings file. Raises `ResultError` with the JSON path of the fault."""
    kind = "ceilings file"
    check_version(parsed(data, _Head, kind).schema_version, SCHEMA_VERSION, kind)
    run = parsed(data, CeilingRun, kind)
    if fault := fault_of_ceilings(measured=run.measured, declared=run.declared):
        raise ResultError(f"not a {kind}: {fault}.")
    return printable(run)
