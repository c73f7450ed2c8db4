"""A failure as a safetensors file: tensors by name, and all else as JSON in its metadata."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch

from mla.cases.memory import Tensors
from mla.command import files
from mla.errors import ResultError
from mla.failures import operands
from mla.failures.call import CallFacts, RecordedCall
from mla.failures.memory import View
from mla.failures.verdict import Expected
from mla.failures.watch import JudgedCall
from mla.text import size
from mla_backends import host, outside

NAME = "failure.safetensors"
BEFORE = "failure-before.safetensors"
KEY = "failure"
VERSION = 1
# What reading a damaged file raises: of the system, of the decoders, and for dtypes that torch lacks.
_DAMAGED = (
    OSError,
    MemoryError,
    ValueError,
    AttributeError,
    TypeError,
    RuntimeError,
    RecursionError,
    msgspec.MsgspecError,
)


class Origin(msgspec.Struct, kw_only=True):
    """Where a failure comes from."""

    backend: str
    options: list[str]  # the words that open the backend again
    device: str
    command: str  # that found it
    where: str  # scenario and implementation, or the check
    reason: str
    seed: int | None = None
    created: str = ""
    git_commit: str | None = None
    environment: dict[str, str] = {}


class Document(msgspec.Struct, kw_only=True):
    """The metadata of a failure; without `call` it holds tensors of a layer, and cannot be replayed."""

    version: int = VERSION
    origin: Origin
    replay: str = ""  # the line that makes the call again
    call: CallFacts | None = None
    reason: str = ""  # of the call
    damage: str = ""
    alone: bool | None = None  # whether the call was wrong without those before it; None: nobody tried


class Failure(msgspec.Struct):
    """A failure read from a file."""

    document: Document
    tensors: Tensors

    def call(self) -> RecordedCall:
        """Return the recorded call. Raises `ResultError` if there is none."""
        facts = self.document.call
        if facts is None:
            raise ResultError(
                "this failure holds tensors of a whole layer, as no single op was found wrong: "
                f"repeat the run instead, with: {self.document.origin.command}"
            )
        names = {view.memory for view in facts.views.values()}
        memory = {name: self.tensors[f"operand.{name}"].flatten() for name in names}
        extra = [self.tensors.get(name) for name in ("weight.packed", "cache.pages", "cache.rows")]
        return RecordedCall(facts, memory, *extra)

    def expected(self) -> Expected:
        """Return what the call must write."""
        return Expected(self._part("expected."), self._part("reference."))

    def _part(self, prefix: str) -> Tensors:
        found = {name: one for name, one in self.tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): one for name, one in found.items()}


def replay_command(folder: Path) -> str:
    """Return the line that makes a kept call again."""
    return shlex.join(["python", "-m", "mla.bench", "replay", str(folder)])


def prepare(folder: Path) -> None:
    """Make the folder of a failure, before a long run. Raises `ResultError`.

    One that is there from an earlier run becomes `BEFORE`: what is replayed is of the last run.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise ResultError(f"cannot write to '{folder}': it is a file, not a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / NAME).exists():
            (folder / NAME).replace(folder / BEFORE)
    except OSError as error:
        raise ResultError(f"cannot write to '{folder}': {error.strerror}.") from error
    files.check_writable(folder / NAME)


def write_call(folder: Path, judged: JudgedCall, origin: Origin) -> None:
    """Keep a call. Raises `ResultError`."""
    call = judged.call
    document = Document(
        origin=origin,
        replay=replay_command(folder),
        call=call.facts,
        reason=judged.reason,
        damage=judged.made.damage,
        alone=judged.alone,
    )
    tensors = {
        f"operand.{name}": _shaped(piece, call.facts.views, name) for name, piece in call.memory.items()
    }
    extra = {"weight.packed": call.weight, "cache.pages": call.kept_pages, "cache.rows": call.pages}
    tensors |= {name: one for name, one in extra.items() if one is not None}
    tensors |= _prefixed("found", judged.made.results) | _prefixed("expected", judged.expected.truth)
    write(folder, document, tensors | _prefixed("reference", judged.expected.reference))


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": one for name, one in tensors.items()}


def _shaped(piece: torch.Tensor, views: dict[str, View], name: str) -> torch.Tensor:
    """Give a piece of memory the shape of its tensor, where it is that and nothing else."""
    members = [view for view in views.values() if view.memory == name]
    shape = members[0].shape
    dense = list(torch.empty(shape, device="meta").stride()) == members[0].stride
    whole = len(members) == 1 and dense and torch.Size(shape).numel() == piece.numel()
    return piece.view(shape) if whole else piece


def write(folder: Path, document: Document, tensors: Tensors) -> None:
    """Write a failure. Raises `ResultError`."""
    whole = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
    metadata = {"format": "pt", KEY: msgspec.json.encode(document).decode()}
    files.write_bytes(safetensors.torch.save(whole, metadata), folder / NAME)


def read(folder: Path) -> Failure:
    """Read what `write` wrote; `folder` may name the file as well. Raises `ResultError`.

    Its call can be made: its tensors are those that its op is called with.
    """
    path = folder / NAME if folder.is_dir() else folder
    try:
        _require_room(path)
        failure = _read(path)
        if failure.document.call is not None:
            operands.check(failure.document.call, failure.tensors)
    except FileNotFoundError as error:
        raise ResultError(f"'{folder}' holds no {NAME}: --dump-failure of a run writes one.") from error
    except (*_DAMAGED, safetensors.SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        reason = " ".join(str(said or error).split()).rstrip(".")
        raise ResultError(f"'{path}' is not a failure that --dump-failure kept: {reason}.") from error
    return failure


def _require_room(path: Path) -> None:
    """Raise OSError or ValueError unless a path is a regular file that fits into memory."""
    _, found = outside.start(path, 0)
    available = host.memory_available()
    if available is not None and found > available:
        raise ValueError(f"it takes {size(found)}, and {size(available)} of memory are available")


def _read(path: Path) -> Failure:
    with safetensors.safe_open(path, framework="pt") as file:
        document = msgspec.json.decode((file.metadata() or {}).get(KEY, ""), type=Document)
        if document.version != VERSION:
            raise ValueError(f"its version is {document.version}, and this program reads version {VERSION}")
        return Failure(document, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping
