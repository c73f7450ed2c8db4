"""Read, upgrade and write result files."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mla.bench.results.schema import SCHEMA_VERSION, Run
from mla.command.files import write_bytes
from mla.errors import ResultError


def encode(run: msgspec.Struct) -> bytes:
    """Return a run, or the result of another command, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n"


def decode(data: bytes) -> Run:
    """Parse and validate a run. Raises `ResultError` with the JSON path of the fault."""
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise ResultError(
                f"a result file of schema version {version}, but this mla reads only up to {SCHEMA_VERSION}: "
                "use the mla that wrote it, or a newer one."
            )
        return _upgrade(msgspec.json.decode(data, type=Run))
    except msgspec.DecodeError as error:
        raise ResultError(f"not a result file: {error}.") from error


class _Version(msgspec.Struct):
    schema_version: int


def _upgrade(run: Run) -> Run:
    """Fill in fields that older versions did not write; `schema_version` stays that of the file."""
    for case in run.cases:
        case.base = case.base or case.scenario
        case.dtype = case.dtype or run.dtype
    return run


def read(path: Path) -> Run:
    """Read a run from its file. Raises `ResultError` naming the file and the cause."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ResultError(f"cannot read '{path}': {error.strerror}.") from error
    except ResultError as error:
        raise ResultError(f"'{path}' is {error}") from error


def write(run: msgspec.Struct, path: Path) -> None:
    """Write a run, or the result of another command, whole or not at all. Raises `ResultError`."""
    write_bytes(encode(run), path)
