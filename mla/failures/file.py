"""A failure as a safetensors file: tensors by name, and all else as JSON in its metadata."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch

from mla.cases.memory import Tensors
from mla.command import files
from mla.errors import MLAError, OutOfMemory, ResultError, UnknownOp, did_you_mean
from mla.failures.call import MAX_CALL_BYTES, CallFacts, JudgedCall, RecordedCall
from mla.failures.check import check
from mla.layer.ops import refusals, sentences
from mla.reference import REFERENCE
from mla.text import size
from mla_backends import host, outside
from mla_backends.api import Backend, FusedOp, current
from mla_backends.errors import LONGEST_LINE, describe

NAME = "failure.safetensors"
BEFORE = "failure-before.safetensors"
KEY = "failure"
VERSION = 2


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


class _Versioned(msgspec.Struct):
    version: int = VERSION


class Document(_Versioned, kw_only=True):
    """The metadata of a failure; without `call` it holds tensors of a layer, and cannot be replayed."""

    origin: Origin
    replay: str = ""  # the line that makes the call again
    call: CallFacts | None = None
    reason: str = ""  # of the call
    alone: bool | None = None  # whether the call was wrong without those before it; None: nobody tried


class Failure(msgspec.Struct):
    """A failure read from a file."""

    document: Document
    tensors: Tensors

    def call(self) -> RecordedCall:
        """Return the recorded call. Raises `ResultError` if there is none."""
        facts, start = self.document.call, "operand."
        if facts is None:
            raise ResultError(
                "this failure holds tensors of a whole layer, as no single op was found wrong: "
                f"repeat the run instead, with: {self.document.origin.command}"
            )
        held = self.tensors
        operands = {name.removeprefix(start): x for name, x in held.items() if name.startswith(start)}
        return RecordedCall(facts, operands, held.get("cache.pages"), held.get("cache.rows"))


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
    call, replay = judged.call, replay_command(folder)
    document = Document(
        origin=origin, replay=replay, call=call.facts, reason=judged.reason, alone=judged.alone
    )
    tensors: Tensors = {}
    if call.kept_pages is not None and call.pages is not None:
        tensors = {"cache.pages": call.kept_pages, "cache.rows": call.pages}
    # What it wrote and what it should have are for a reader: a replay computes the truth again.
    for part, held in {"operand": call.operands, "found": judged.results, "expected": call.truth}.items():
        tensors |= {f"{part}.{name}": tensor for name, tensor in held.items()}
    write(folder, document, tensors)


def write(folder: Path, document: Document, tensors: Tensors) -> None:
    """Write a failure. Raises `ResultError`."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", KEY: msgspec.json.encode(document).decode()}
    files.write_bytes(safetensors.torch.save(whole, metadata), folder / NAME)


def read(folder: Path) -> Failure:
    """Read what `write` wrote; `folder` may name the file as well. Raises `ResultError`."""
    path = folder / NAME if folder.is_dir() else folder
    try:
        _, needed = outside.start(path, 0)
        available = host.memory_available()
        if available is not None and needed > available:
            raise ValueError(f"it takes {size(needed)}, and {size(available)} of memory are available")
        with safetensors.safe_open(path, framework="pt") as file:
            words = (file.metadata() or {}).get(KEY, "")
            if (version := msgspec.json.decode(words, type=_Versioned).version) != VERSION:
                wrong = f"its version is {version}, and this program reads version {VERSION}"
                raise ValueError(f"{wrong}: run the command that kept it again")
            document = msgspec.json.decode(words, type=Document)
            kept = Failure(document, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping
        if document.call is not None:
            check(kept.call())
        return kept
    except FileNotFoundError as error:
        raise ResultError(f"'{folder}' holds no {NAME}: --dump-failure of a run writes one.") from error
    except Exception as error:  # whatever damaged facts raise
        said = error.strerror if isinstance(error, OSError) else None
        known = isinstance(error, (OSError, ValueError, msgspec.MsgspecError, safetensors.SafetensorError))
        reason = " ".join((said or (str(error) if known else describe(error))).split()).rstrip(".")
        reason = outside.shortened(reason, LONGEST_LINE)
        raise ResultError(f"'{path}' is not a failure that --dump-failure kept: {reason}.") from error


# ---------------------------------------------------------------------------------------------------- replay


class CannotReplay(MLAError):
    """An op that does not serve the kept call."""

    exit_code = 3


def replay(failure: Failure, backend: Backend, name: str | None = None, runs: int = 1) -> list[str]:
    """Make the call `runs` times with the op `name` (default: the one that failed).

    Returns why each was wrong, "" for one that was right. Raises `CannotReplay`, `UnknownOp`, `OutOfMemory`
    and `ResultError`.
    """
    call, device = failure.call(), backend.device
    assert device is not None
    name = call.facts.op if name is None else name
    op = op_of(call, backend.ops(), name)
    if reasons := _refusals(call, name, op, call.spec(device)):
        raise CannotReplay(f"the op refuses this call: {'; '.join(reasons)}.")
    _require_memory(call, backend)
    try:
        call.expect()
    except Exception as error:
        said = outside.shortened(describe(error), LONGEST_LINE)
        raise ResultError(f"the kept call cannot be judged: {said}.") from error
    return [call.attempt(op, device, backend.synchronize).reason for _ in range(runs)]


def op_of(call: RecordedCall, offered: Mapping[str, FusedOp], name: str) -> FusedOp:
    """Return an op by name. Raises `UnknownOp` if the backend has none of that kind and name."""
    kind = call.facts.kind
    known = {"reference": REFERENCE[kind]}
    known |= {key: op for key, op in offered.items() if current(op.contract, kind) and key not in known}
    if name not in known:
        raise UnknownOp(
            f"this backend offers no {kind} named '{name}'.{did_you_mean(name, list(known))} "
            f"--op takes: {', '.join(known)}."
        )
    return known[name]


def _refusals(call: RecordedCall, name: str, op: FusedOp, spec: object) -> list[str]:
    """Return why an op does not serve a call; none if it does."""
    facts = call.facts
    reasons = refusals(name, op, facts.kind, spec)
    if not reasons and call.entry.prepares:
        page_size = None if call.pages is None else call.pages.shape[1]
        answer = op.unsupported_batch(spec, facts.query_lens, facts.kv_lens, page_size)
        reasons = sentences(name, "unsupported_batch()", answer)
    if "lse" in facts.absent and not op.lse_optional and name != facts.op:
        reasons.append(f"op '{name}' needs an lse to write to, and the kept call has none")
    return reasons


def _require_memory(call: RecordedCall, backend: Backend) -> None:
    """Raise `OutOfMemory` if the device has no room for the call; the file holds only a part of a cache."""
    cache = 0 if call.pages is None else call.facts.pages * call.pages[:1].nbytes
    compared = cache if cache <= MAX_CALL_BYTES else 0
    on_host = backend.device is not None and backend.device.type == "cpu"
    needed = cache + compared * (4 if on_host else 1) + call.placed_bytes
    free = host.memory_available() if on_host else backend.memory().free
    if free is not None and needed > free:
        raise OutOfMemory(f"this call needs {size(needed)} of memory, and {size(free)} are free: free more.")
