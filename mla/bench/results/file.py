"""Read, upgrade and write result files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mla.bench.results import passes, validity
from mla.bench.results.printable import printable
from mla.bench.results.schema import SCHEMA_VERSION, Run
from mla.command.files import write_bytes
from mla.errors import ResultError
from mla_backends import outside
from mla_backends.outside import escaped, shortened

T = TypeVar("T")

_MOST = 1 << 30  # bytes of a file: thousands of cases come to some 100 MB

# The first version whose throughput is that of all passes together.
TOTAL = 4


def encode(run: msgspec.Struct) -> bytes:
    """Return a run, or the result of another command, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n"


def decode(data: bytes) -> Run:
    """Parse and validate a run. Raises `ResultError` with the JSON path of the fault.

    What is not printable in its strings is escaped, so that no file can act on a terminal or break a table.
    """
    kind = "result file"
    head = parsed(data, _Head, kind)
    if other := head.other():
        raise ResultError(f"not a {kind}: {other}")
    check_version(head.schema_version, SCHEMA_VERSION, kind)
    run = _upgrade(parsed(data, Run, kind))
    if fault := validity.fault_of_run(run):
        raise ResultError(f"not a {kind}: {fault}.")
    return printable(run)


def parsed(data: bytes, type_: type[T], kind: str) -> T:
    """Return JSON as a structure. Raises `ResultError`, which names the `kind` of file and the fault."""
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.DecodeError as error:
        raise ResultError(f"not a {kind}: {shortened(escaped(str(error)))}.") from error
    except (RecursionError, ValueError) as error:  # brackets without end; a number or a text like no other
        raise ResultError(f"not a {kind}: JSON is malformed ({type(error).__name__}).") from error


def check_version(version: int, newest: int, kind: str) -> None:
    """Raise `ResultError` for a file of a newer version than this program reads."""
    if version > newest:
        raise ResultError(
            f"a {kind} of schema version {version}, but this mla reads only up to {newest}: use the mla that "
            "wrote it, or a newer one."
        )


class _Head(msgspec.Struct):
    """What tells a run from other files of this program."""

    schema_version: int = 0
    report: Any = None
    checks: Any = None
    planned: Any = None

    def other(self) -> str:
        """Return what another file holds and how to read it; "" for a run, or what nobody knows."""
        if self.report == "ceilings":
            return "it holds ceilings, which `python -m mla.bench show` prints."
        if self.checks is not None and self.planned is not None:
            return (
                "it holds the report of `python -m mla.conformance`, which prints its card when it is made."
            )
        return ""


def _upgrade(run: Run) -> Run:
    """Fill in fields that older versions did not write; `schema_version` stays that of the file.

    Their throughput was the median pass's: it is made again from the samples, if these can be.
    """
    for case in run.cases:
        case.base = case.base or case.scenario
        case.dtype = case.dtype or run.dtype
        samples = passes.of(case)
        whole = sum(map(len, samples)) == case.passes * case.steps_per_pass
        if run.schema_version < TOTAL and case.tokens_per_s and whole and all(map(sum, samples)):
            case.tokens_per_s = passes.throughput(samples, sum(case.query_lens))
    return run


def read(path: Path) -> Run:
    """Read a run from its file. Raises `ResultError` naming the file and the cause."""
    return decoded(content(path), path, decode)


def content(path: Path) -> bytes:
    """Return what a file or a pipe holds. Raises `ResultError`."""
    try:
        return outside.read(path, most=_MOST)
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
