"""Read, upgrade and write result files: those of runs, and those of `ceilings`. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from mla.bench.results import cases
from mla.bench.results.schema import CEILINGS_VERSION, SCHEMA_VERSION, CeilingRun, Run
from mla.command.files import write_bytes
from mla.errors import ResultError
from mla_backends import outside
from mla_backends.outside import escaped, shortened

T = TypeVar("T")

_MAX_BYTES = 1 << 30  # bytes of a file: thousands of cases come to some 100 MB

# The first version whose throughput is that of all passes together.
TOTAL = 4


def encode(run: msgspec.Struct) -> bytes:
    """Return a run, or the result of another command, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n"


def decode(data: bytes) -> Run:
    """Parse and validate a run. Raises `ResultError` with the JSON path of the fault."""
    stored = decode_any(data)
    if isinstance(stored, Run):
        return stored
    raise ResultError("not a result file: it holds ceilings; `mla-bench show` prints them.")


def decode_any(data: bytes) -> Run | CeilingRun:
    """Parse and validate a run, or what `ceilings` stored. Raises `ResultError` with the place of the fault.

    What is not printable in its strings is escaped, so that no file can act on a terminal or break a table.
    """
    head = _parsed(data, _Head)
    if head.checks is not None:
        raise ResultError(
            "not a result file: it holds a report of `mla-conformance`, which printed its card."
        )
    newest = CEILINGS_VERSION if head.report == "ceilings" else SCHEMA_VERSION
    if head.schema_version > newest:
        raise ResultError(
            f"a result file of schema version {head.schema_version}, but this mla reads only up to {newest}: "
            "use the mla that wrote it, or a newer one."
        )
    if head.report == "ceilings":
        return printable(_parsed(data, CeilingRun))
    return printable(_upgrade(_parsed(data, Run)))


class _Head(msgspec.Struct):
    """What tells runs from ceilings, and from reports of conformance."""

    schema_version: int = 0
    report: Any = None
    checks: Any = None


def _parsed(data: bytes, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.DecodeError as error:
        raise ResultError(f"not a result file: {shortened(escaped(str(error)))}.") from error
    except (RecursionError, ValueError) as error:  # brackets without end; a number or a text like no other
        raise ResultError(f"not a result file: JSON is malformed ({type(error).__name__}).") from error


def _upgrade(run: Run) -> Run:
    """Fill in fields that older versions did not write; `schema_version` stays that of the file.

    Their throughput was the median pass's: it is made again from the samples, if these can be.
    """
    for case in run.cases:
        case.base = case.base or case.scenario
        case.dtype = case.dtype or run.dtype
        passes = cases.passes_of(case)
        if run.schema_version < TOTAL and case.tokens_per_s and passes and all(map(sum, passes)):
            case.tokens_per_s = cases.throughput_of(passes, sum(case.query_lens))
    return run


def read(path: Path) -> Run:
    """Read a run from its file. Raises `ResultError` naming the file and the cause."""
    return decoded(content(path), path, decode)


def content(path: Path) -> bytes:
    """Return what a file or a pipe holds. Raises `ResultError`."""
    try:
        return outside.read(path, most=_MAX_BYTES)
    except OSError as error:
        raise ResultError(f"cannot read '{path}': {error.strerror}.") from error


def decoded(data: bytes, path: Path, decode: Callable[[bytes], T]) -> T:
    """Return what the content of a file means. Raises `ResultError` naming the file."""
    try:
        return decode(data)
    except ResultError as error:
        raise ResultError(f"'{path}' is {error}") from error


def write(run: msgspec.Struct, path: Path) -> None:
    """Write a run, or the result of another command, whole or not at all. Raises `ResultError`."""
    write_bytes(encode(run), path)


def printable(value: T) -> T:
    """Return a copy of a result, or of a part of it, with `escaped` strings."""
    return cast(T, _printable(value))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (int, float)):  # samples: many, and no text
            return value
        return type(value)(map(_printable, value))
    if isinstance(value, msgspec.Struct):
        fields = value.__struct_fields__
        return type(value)(**{name: _printable(getattr(value, name)) for name in fields})
    return value
