"""A failure as a safetensors file: tensors by name, and all else as JSON in its metadata."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch

from mla.cache.formats import codec_of
from mla.cache.index_formats import index_codec
from mla.cases import KINDS
from mla.cases.case import OPTIONAL, Kind, dim, entry_of
from mla.cases.memory import Tensors
from mla.command import files
from mla.errors import MLAError, OutOfMemory, ResultError, UnknownOp, did_you_mean
from mla.failures.call import (
    CONTEXT,
    MAX_CALL_BYTES,
    CallFacts,
    JudgedCall,
    RecordedCall,
    attempted,
    expected,
    format_in,
    placed_bytes,
)
from mla.layer.ops import refusals, sentences
from mla.reference import REFERENCE
from mla.text import DTYPES, dtype_name, size
from mla_backends import host, outside
from mla_backends.api import Backend, FusedOp, current

NAME = "failure.safetensors"
BEFORE = "failure-before.safetensors"
KEY = "failure"
VERSION = 2  # 1: operands as pieces of memory
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


class _Versioned(msgspec.Struct):
    version: int = VERSION


class Document(_Versioned, kw_only=True):
    """The metadata of a failure; without `call` it holds tensors of a layer, and cannot be replayed."""

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
        named = (name.partition("operand.")[::2] for name in self.tensors)
        operands = {name: self.tensors[f"operand.{name}"] for before, name in named if name and not before}
        return RecordedCall(facts, operands, *map(self.tensors.get, ("cache.pages", "cache.rows")))


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
    extra = {"cache.pages": call.kept_pages, "cache.rows": call.pages}
    tensors = {name: tensor for name, tensor in extra.items() if tensor is not None}
    # What it wrote and what it should have are for a reader: a replay computes the truth again.
    parts = {"operand": call.operands, "found": judged.made.results, "expected": judged.expected.truth}
    for part, held in parts.items():
        tensors |= {f"{part}.{name}": tensor for name, tensor in held.items()}
    write(folder, document, tensors)


def write(folder: Path, document: Document, tensors: Tensors) -> None:
    """Write a failure. Raises `ResultError`."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
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
            _check(failure.document.call, failure.tensors)
    except FileNotFoundError as error:
        raise ResultError(f"'{folder}' holds no {NAME}: --dump-failure of a run writes one.") from error
    except (*_DAMAGED, safetensors.SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        reason = " ".join(str(said or error).split()).rstrip(".")
        raise ResultError(f"'{path}' is not a failure that --dump-failure kept: {reason}.") from error
    return failure


def _require_room(path: Path) -> None:
    """Raise OSError or ValueError unless a path is a regular file that fits into memory."""
    _, needed = outside.start(path, 0)
    available = host.memory_available()
    if available is not None and needed > available:
        raise ValueError(f"it takes {size(needed)}, and {size(available)} of memory are available")


def _read(path: Path) -> Failure:
    with safetensors.safe_open(path, framework="pt") as file:
        words = (file.metadata() or {}).get(KEY, "")
        if (version := msgspec.json.decode(words, type=_Versioned).version) != VERSION:
            said = f"its version is {version}, and this program reads version {VERSION}"
            raise ValueError(f"{said}: run the command that kept it again")
        document = msgspec.json.decode(words, type=Document)
        return Failure(document, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping


# --------------------------------------------------------------------------- whether a kept call can be made

# A kept failure may come from anybody, and ops take addresses: no op is called before all of this holds.

_MAX_SIZE = 2**31 - 1  # of a size in a spec, and of a length


def _check(facts: CallFacts, tensors: Tensors) -> None:
    """Raise ValueError, with one clause, unless the tensors of a file are those of the call it describes.

    Names, dtypes, shapes and values are checked in this order: ops trust their tables, and a wrong slot or
    page would have them read or write anywhere.
    """
    _require(facts.kind in KINDS, f"there is no kind of op '{facts.kind}'")
    kind = entry_of(facts.kind, format_in(facts.spec))
    sizes = _spec_sizes(kind, facts)
    dtype = getattr(torch, facts.spec["dtype"])
    inputs = [name for name in kind.operands if name not in {*kind.results, *facts.absent}]
    words = {f"operand.{name}": kind.operands[name] for name in inputs}
    words |= {"operand.weight": kind.packed} if kind.packed else {}
    words |= {"cache.pages": "kept", "cache.rows": f"kept page {kind.cached}"} if kind.cached else {}
    _check_names(kind, facts, tensors, words.keys())
    if kind.cached:
        sizes["page"] = tensors["cache.rows"].shape[1] if tensors["cache.rows"].dim() == 3 else 0
        _require(min(facts.pages, sizes["page"]) > 0, "its cache has no pages")
    dtypes = {**kind.dtypes, "cache.pages": torch.int64, "cache.rows": kind.dtypes.get("cache", dtype)}
    given: dict[str, tuple[torch.dtype, Sequence[int]]]
    given = {name: (tensors[name].dtype, tensors[name].shape) for name in words}
    given |= {name: (dtypes.get(name, dtype), shape) for name, shape in facts.outputs.items()}
    for full, (of, shape) in given.items():
        name, letters = full.removeprefix("operand."), (words.get(full) or kind.operands[full]).split()
        for word, count in zip(letters, shape, strict=False):
            sizes = dict.fromkeys(word.split("+"), count) | sizes  # a letter that is new gets its size here
        fits = len(letters) == len(shape) and of == dtypes.get(name, dtype)
        fits = fits and [dim(word, sizes) for word in letters] == list(shape)
        what = f"{name} is {dtype_name(of)} {list(shape)}"
        _require(fits, f"{what}, not {dtype_name(dtypes.get(name, dtype))} [{', '.join(letters)}]")
    _check_values(facts, tensors, sizes)


def _require(holds: bool, clause: str) -> None:
    if not holds:
        raise ValueError(clause)


def _spec_sizes(kind: Kind, facts: CallFacts) -> dict[str, int]:
    """Return letter -> size of a spec that can be made."""
    spec, name, fields = facts.spec, kind.spec.__name__, dataclasses.fields(kind.spec)
    names = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    fits = needed <= spec.keys() <= names
    _require(fits, f"its {name} does not have the fields {', '.join(sorted(names))}")
    _require(spec["dtype"] in DTYPES.values(), "no layer has the dtype of its spec")
    _require(_is(float, spec.get("softmax_scale", 1.0)), "softmax_scale is not a number")
    for name in kind.letters.values():
        size = spec[name]
        _require(type(size) is int and 0 < size <= _MAX_SIZE, f"{name} of its spec is not a size")
    cache_format = format_in(spec)
    known = isinstance(cache_format, str) and facts.scalars.get("cache_format", "") == cache_format
    _require(known, "its cache format is unknown")
    if cache_format:  # which may raise `CacheFormatError`, a ValueError
        widths = [spec[name] for name in ("head_dim", "kv_lora_rank", "qk_rope_head_dim") if name in spec]
        codec = (index_codec if "head_dim" in spec else codec_of)(cache_format, *widths)
        fits = codec is not None and spec.get("token_bytes") == codec.token_bytes
        _require(fits, f"its bytes per token do not match {cache_format}")
    return {letter: spec[name] for letter, name in kind.letters.items()}


def _is(kind: type, value: Any) -> bool:
    """Return whether a value of JSON is a string, a bool, or a number that fp32 can hold."""
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e38
    return type(value) is kind


def _check_names(kind: Kind, facts: CallFacts, tensors: Tensors, needed: Set[str]) -> None:
    """Check that the file has all that it must hold, and that only what may be absent is."""
    absent, outputs = set(facts.absent), set(kind.operands) & set(kind.results)
    given = set(facts.outputs) | ({"out"} if facts.in_place and kind.in_place else set())
    whole = absent <= OPTIONAL & kind.operands.keys() and given == outputs - absent
    _require(whole, f"the operands of {facts.kind} are {', '.join(kind.operands)}")
    scalars = facts.scalars.keys() == kind.scalars.keys()
    scalars = scalars and all(_is(of, facts.scalars[name]) for name, of in kind.scalars.items())
    _require(scalars, f"the scalars of {facts.kind} are {', '.join(kind.scalars) or 'none'}")
    missing = sorted(needed - tensors.keys())
    _require(not missing, f"it lacks the tensor '{', '.join(missing)}'")
    held = {name for name in tensors if name.startswith(("operand.", "cache."))}
    _require(held <= needed, f"{facts.kind} takes no '{', '.join(sorted(held - needed))}'")


def _check_values(facts: CallFacts, tensors: Tensors, sizes: Mapping[str, int]) -> None:
    """Check what operands say about others: pages, slots and lengths."""
    call = {name.removeprefix("operand."): tensor for name, tensor in tensors.items()}
    lengths = (facts.query_lens, facts.kv_lens)
    _require(len(facts.query_lens) == len(facts.kv_lens), "it does not have two lengths of every request")
    if KINDS[facts.kind].prepares:
        _require(facts.role != CONTEXT, "its role is of another kind of op")
        _require(bool(facts.query_lens), "it has no request")
        _require(sum(facts.query_lens) == sizes["T"], "its new tokens are not the rows of q")
        if facts.causal:  # a request without keys is allowed
            fewer = any(keys and keys < new for new, keys in zip(*lengths, strict=True))
            _require(not fewer, "a request has fewer tokens than new ones")
    elif facts.query_lens:
        _require(sum(lengths[facts.role == CONTEXT]) == sizes["T"], "its lengths are not the rows of out")
    if "K" in sizes and (facts.kv_lens or KINDS[facts.kind].prepares):
        _require(sum(facts.kv_lens) == sizes["K"], "its keys are not the rows of k")
    if "cache.rows" not in tensors:
        return
    count, page = facts.pages, sizes["page"]
    if "slots" in call:
        _require(_within(call["slots"], count * page), "slots point outside the cache")
        _require(len(call["slots"].unique()) == len(call["slots"]), "slots are not distinct")
    else:
        counted = torch.tensor([0, *facts.query_lens]).cumsum(0).tolist()
        _require(call["cu_q"].tolist() == counted, "cu_q does not count the new tokens")
        _require(call["kv_lens"].tolist() == facts.kv_lens, "kv_lens are not its lengths")
        _require(max(facts.kv_lens) <= sizes["m"] * page, "block_table has too few pages")
        _require(_within(call["block_table"], count), "block_table points outside the cache")
    if "selection" in call:
        lengths_of = call["kv_lens"].repeat_interleave(call["cu_q"].diff())[:, None]
        named = ((call["selection"] >= -1) & (call["selection"] < lengths_of)).all()
        _require(bool(named), "selection points outside its request")
    kept = KINDS[facts.kind].touched(call, page)
    _require(torch.equal(kept, tensors["cache.pages"]), "it does not hold the pages that the call reads")


def _within(numbers: torch.Tensor, stop: int) -> bool:
    return not numbers.numel() or (int(numbers.min()) >= 0 and int(numbers.max()) < stop)


# ---------------------------------------------------------------------------------------------------- replay


class CannotReplay(MLAError):
    """An op that does not serve the kept call."""

    exit_code = 3


def replay(failure: Failure, backend: Backend, name: str | None = None, runs: int = 1) -> list[str]:
    """Make the call `runs` times with the op `name` (default: the one that failed).

    Returns why each was wrong, "" for one that was right. Raises `CannotReplay`, `UnknownOp` and
    `OutOfMemory`.
    """
    call = failure.call()
    op = op_of(call, backend.ops(), call.facts.op if name is None else name)
    assert backend.device is not None
    _require_served(call, name or call.facts.op, op, backend)
    _require_memory(call, backend)
    right = expected(call)
    return [attempted(call, op, backend.device, backend.synchronize, right)[0] for _ in range(runs)]


def op_of(call: RecordedCall, offered: Mapping[str, FusedOp], name: str) -> FusedOp:
    """Return an op by name. Raises `UnknownOp` if the backend has none of that kind and name."""
    kind = call.facts.kind
    known = {offered_name: op for offered_name, op in offered.items() if current(op.contract, kind)}
    if name == "reference":
        return REFERENCE[kind]
    if name not in known:
        names = ["reference", *known]
        raise UnknownOp(
            f"this backend offers no {kind} named '{name}'.{did_you_mean(name, names)} "
            f"--op takes: {', '.join(names)}."
        )
    return known[name]


def _require_served(call: RecordedCall, name: str, op: FusedOp, backend: Backend) -> None:
    spec = call.spec(backend.device)  # type: ignore[arg-type]  # it is set up
    reasons = refusals(name, op, call.facts.kind, spec)
    if not reasons and call.entry.prepares:
        size = None if call.pages is None else call.pages.shape[1]
        answer = op.unsupported_batch(spec, call.facts.query_lens, call.facts.kv_lens, size)
        reasons = sentences(name, "unsupported_batch()", answer)
    if "lse" in call.facts.absent and not op.lse_optional and name != call.facts.op:
        reasons.append(f"op '{name}' needs an lse to write to, and the kept call has none")
    if reasons:
        raise CannotReplay(f"the op refuses this call: {'; '.join(reasons)}.")


def _require_memory(call: RecordedCall, backend: Backend) -> None:
    """Raise `OutOfMemory` if the device has no room for the call; the file holds only a part of a cache."""
    cache = 0 if call.pages is None else call.facts.pages * call.pages[:1].nbytes
    compared = cache if cache <= MAX_CALL_BYTES else 0
    on_host = backend.device is not None and backend.device.type == "cpu"
    needed = cache + compared * (4 if on_host else 1) + placed_bytes(call)
    free = host.memory_available() if on_host else backend.memory().free
    if free is not None and needed > free:
        raise OutOfMemory(f"this call needs {size(needed)} of memory, and {size(free)} are free: free more.")
