"""One call of an op, recorded before it was made: a case, and its operands as they lay in memory.

Ops that are watched have each call recorded, made and judged, until the first one that is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import torch

from mla.cases import KINDS
from mla.cases.case import Kind, OpCase, entry_of
from mla.cases.memory import (
    ALIGNED,
    MAX_BESIDE,
    NO_GAPS,
    Layout,
    Piece,
    Tensors,
    changed_slots,
    poison,
    same_numbers,
    strides,
)
from mla.errors import MLAError
from mla.reference import REFERENCE
from mla.text import dtype_name, size
from mla.verify.layer_check import stands_for
from mla.verify.places import Places
from mla_backends.api import FusedOp, LinearSpec, NormSpec, SegmentLengths
from mla_backends.errors import BackendError, describe

# A call that reads more is not kept.
MAX_CALL_BYTES = 2 << 30
CONTEXT = "kv_b_proj"  # the role whose rows are all cached tokens
OUTPUTS = ("out", "lse")  # what an op writes, besides the cache
Lengths = tuple[Sequence[int], Sequence[int]]  # per request: new tokens, and keys
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]  # a size or a length in a file
Gaps = tuple[Count, Count, Count]  # as in `Layout.gaps`


class TooLarge(MLAError):
    """A call that reads more than is kept."""


class CallFacts(msgspec.Struct, kw_only=True):
    """What is not a tensor."""

    kind: str  # of op
    role: str  # in the layer; that of an op alone is its kind
    op: str  # the name that the backend gave it
    spec: dict[str, Any]
    scalars: dict[str, float | bool | str]
    absent: list[str]  # arguments that were None
    outputs: dict[str, list[Count]]  # the shapes of those that the call was given
    gaps: dict[str, Gaps]  # of operands and outputs, where there are any
    in_place: bool = False  # the output was the input
    pages: Count = 0  # of the cache
    query_lens: list[Count] = []
    kv_lens: list[Count] = []
    causal: bool = True
    writes_lse: bool = True


def format_in(spec: Mapping[str, Any]) -> Any:
    """Return the format of the cache of an op, given the fields of its spec; "" where it is plain."""
    return spec.get("cache_format") or spec.get("index_format", "")


@dataclass(frozen=True)
class RecordedCall:
    """A call on the host.

    Operands are contiguous copies; `facts.gaps` say how they lay. Of a cache, only the pages that the call
    reads or writes are kept.
    """

    facts: CallFacts
    operands: Tensors  # before it; with the weight as `pack` was given it
    kept_pages: torch.Tensor | None = None  # [k] int64
    pages: torch.Tensor | None = None  # [k, page, w]: their contents

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer."""
        dtype: torch.dtype = getattr(torch, self.facts.spec["dtype"])
        return dtype

    @property
    def entry(self) -> Kind:
        """The entry of the call's kind."""
        return entry_of(self.facts.kind, format_in(self.facts.spec))

    @property
    def case(self) -> OpCase:
        """The call without its operands, on the host."""
        facts = self.facts
        layout = Layout(1 if self.pages is None else self.pages.shape[1], gaps=facts.gaps)
        keys, spec = tuple(facts.kv_lens), self.spec(torch.device("cpu"))
        new = keys if facts.role == CONTEXT else tuple(facts.query_lens)
        return OpCase(facts.kind, spec, new, keys, causal=facts.causal, layout=layout)

    def spec(self, device: torch.device) -> Any:
        """Return the spec on a device."""
        return self.entry.spec(**{**self.facts.spec, "dtype": self.dtype, "device": device})

    def arguments(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
        """Return the arguments of the call: these tensors, the scalars, and a cache, else NaN."""
        given: dict[str, Any] = {**tensors, **self.facts.scalars, **dict.fromkeys(self.facts.absent)}
        if self.pages is None or self.kept_pages is None:
            return given
        shape, dtype = (self.facts.pages, *self.pages.shape[1:]), self.pages.dtype
        cache = torch.full(shape, stands_for(torch.nan, dtype), dtype=dtype, device=device)
        cache[self.kept_pages.to(device)] = self.pages.to(device)
        return {**given, "cache": cache}

    def leading(self, op: FusedOp, spec: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what precedes the arguments: the packed weight, or a state that `op` prepares."""
        if self.entry.packed:
            return (op.pack(self.operands["weight"].to(spec.device, copy=True)),)
        batch = self.entry.batch(arguments, self.case.lengths)
        return () if batch is None else (op.prepare(spec, batch),)

    def sizes(self) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        """Return the shape and the dtype of every tensor that the call is given, but for the cache."""
        case, packed = self.case, {"weight"} if self.entry.packed else set()
        given = {name: x for name, x in self.operands.items() if name not in packed}
        shapes: dict[str, tuple[Sequence[int], torch.dtype]]
        shapes = {name: (tuple(x.shape), x.dtype) for name, x in given.items()}
        return shapes | {name: (shape, case.dtype(name)) for name, shape in self.facts.outputs.items()}


def placed(call: RecordedCall, device: torch.device) -> tuple[dict[str, Piece], dict[str, Any]]:
    """Return a call's memory on a device by name, strided as it was, and its arguments.

    Nobody may write beside it: there is NaN, and beside tables a valid entry, so that an op which reads too
    far gives a wrong result and no invalid address.
    """
    pieces: dict[str, Piece] = {}
    for name, (shape, dtype) in call.sizes().items():
        operand, fill = call.operands.get(name), torch.nan
        if operand is not None and operand.numel() and not operand.is_floating_point():
            fill = operand.flatten()[-1].item()
        piece = pieces[name] = Piece(shape, dtype, device, call.facts.gaps.get(name, NO_GAPS), fill=fill)
        poison(piece.part) if operand is None else piece.part.copy_(operand)
        piece.seal()
    arguments = call.arguments({name: piece.part for name, piece in pieces.items()}, device)
    return pieces, arguments | ({"out": arguments["x"]} if call.facts.in_place else {})


def placed_bytes(call: RecordedCall) -> int:
    """Return how much memory a call that is `placed` takes, without its cache."""
    total = 0
    for name, (shape, dtype) in call.sizes().items():
        gaps = call.facts.gaps.get(name, NO_GAPS)
        total += (gaps[0] + shape[0] * strides(shape, gaps)[0]) * dtype.itemsize
    return 2 * (total + len(call.sizes()) * (2 * MAX_BESIDE + ALIGNED) * 8)  # and what it held before


@dataclass(frozen=True)
class Known:
    """What a call's tensors do not say."""

    kind: str
    role: str
    op: str
    spec: Any
    weight: torch.Tensor | None = None
    lengths: SegmentLengths | None = None  # of expanded attention
    writes_lse: bool = True


def record(known: Known, tensors: Mapping[str, Any], of_step: Lengths | None = None) -> RecordedCall:
    """Copy a call to the host before it is made. Raises `TooLarge` beyond `MAX_CALL_BYTES`.

    `tensors` are the arguments by name, scalars included. `of_step`: new tokens and keys per request, to name
    the rows of ops that are not told. Waits for the device.
    """
    given = {name: x for name, x in tensors.items() if torch.is_tensor(x) and name != "cache"}
    inputs = {name: x for name, x in given.items() if name not in OUTPUTS}
    inputs |= {} if known.weight is None else {"weight": known.weight.detach()}
    cache = tensors.get("cache")
    kept = None if cache is None else KINDS[known.kind].touched(tensors, cache.shape[1])
    _require_room(known, inputs, cache, kept)
    lengths = _lengths(known, tensors, of_step)
    places = [(x.data_ptr(), x.device, x.shape) for x in inputs.values() if x.numel()]
    in_place = "out" in given and (given["out"].data_ptr(), given["out"].device, given["out"].shape) in places
    facts = CallFacts(
        kind=known.kind,
        role=known.role,
        op=known.op,
        spec=_plain(known.spec),
        scalars={name: x for name, x in tensors.items() if isinstance(x, (bool, int, float, str))},
        absent=[name for name, x in tensors.items() if x is None],
        outputs={name: list(given[name].shape) for name in OUTPUTS if name in given and not in_place},
        gaps={name: gaps for name, x in given.items() if any(gaps := gaps_of(x))},
        in_place=in_place,
        query_lens=lengths[0],
        kv_lens=lengths[1],
        causal=known.lengths.causal if known.lengths else True,
        writes_lse=known.writes_lse,
    )
    operands = {name: x.to("cpu", copy=True).contiguous() for name, x in inputs.items()}
    if cache is None or kept is None:
        return RecordedCall(facts, operands)
    facts.pages = cache.shape[0]
    return RecordedCall(facts, operands, kept, cache[kept.to(cache.device)].cpu())


def gaps_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return the gaps of a tensor, as in `Layout.gaps`; none where its strides are not of that form.

    Numbers before the first, modulo the alignment, and behind each row and each part of up to three
    dimensions.
    """
    shape, gaps, usual = tensor.shape, [0, 0], 1
    if not 0 < tensor.dim() <= 3 or (shape[-1] > 1 and tensor.stride(-1) != 1):
        return (0, 0, 0)
    for dim in range(tensor.dim() - 2, -1, -1):
        usual *= max(1, shape[dim + 1])
        stride = tensor.stride(dim) if shape[dim] > 1 else usual
        gaps[min(dim, 1)], usual = stride - usual, stride
    return (int(tensor.storage_offset()) % ALIGNED, gaps[0], gaps[1]) if min(gaps) >= 0 else (0, 0, 0)


def _plain(spec: Any) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {**values, "dtype": dtype_name(spec.dtype), "device": ""}


def _require_room(
    known: Known, inputs: Tensors, cache: torch.Tensor | None, kept: torch.Tensor | None
) -> None:
    needed = sum(x.nbytes for x in inputs.values())
    needed += 0 if cache is None or kept is None else len(kept) * cache[0].nbytes
    if needed > MAX_CALL_BYTES:
        raise TooLarge(
            f"a call of {known.role} reads {size(needed)}, more than the {size(MAX_CALL_BYTES)} that are "
            "kept: choose a smaller shape."
        )


def _lengths(
    known: Known, tensors: Mapping[str, Any], of_step: Lengths | None
) -> tuple[list[int], list[int]]:
    if known.lengths is not None:
        return list(known.lengths.query_lens), list(known.lengths.kv_lens)
    if "cu_q" in tensors:
        return tensors["cu_q"].cpu().diff().tolist(), tensors["kv_lens"].cpu().tolist()
    rows = tensors[KINDS[known.kind].varied[0]].shape[0]
    whole = of_step[known.role == CONTEXT] if of_step else ()
    return ([], []) if of_step is None or sum(whole) != rows else (list(of_step[0]), list(of_step[1]))


def poison_outputs(tensors: Mapping[str, Any]) -> None:
    """Poison `out` and `lse`, unless they share memory with what the op reads."""
    given = {name: x for name, x in tensors.items() if torch.is_tensor(x)}
    read = {_storage(x) for name, x in given.items() if name not in OUTPUTS}
    for name in OUTPUTS:
        if name in given and _storage(given[name]) not in read:
            poison(given[name])


def _storage(tensor: torch.Tensor) -> tuple[str, int]:
    """Return what identifies the memory that a tensor is a view of."""
    return (str(tensor.device), tensor.untyped_storage().data_ptr())


# ------------------------------------------------------------------------------------------------ watched ops


# Seconds after which calls are made without being judged: the oracle may take a while.
JUDGING_S = 120.0


@dataclass(frozen=True)
class JudgedCall:
    """A call, what it did, and why that was wrong."""

    call: RecordedCall
    made: Made
    expected: Expected
    reason: str  # "": it was right
    alone: bool | None = None  # whether it is wrong as well when it is made again, with no call before it


@dataclass(frozen=True)
class Prepared:
    """A prepared state, and the lengths it was prepared for."""

    state: Any
    batch: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)


class Watcher:
    """Judges the calls of the ops that it has given out."""

    def __init__(
        self,
        synchronize: Callable[[], None],
        beat: Callable[[], None] = lambda: None,
        patience: float = JUDGING_S,
        poisons: bool = True,
    ) -> None:
        """`beat` is called after every call that was judged. `poisons`: outputs, before every call."""
        self._synchronize, self._beat, self._deadline = synchronize, beat, time.monotonic() + patience
        self._poisons = poisons
        self.wrong: JudgedCall | None = None
        self.last: JudgedCall | None = None  # that was right
        self.lengths: Lengths | None = None  # new tokens and keys per request, of the calls that follow
        self.judged = 0  # calls that were
        self.reason = ""  # why a call was not

    @property
    def done(self) -> bool:
        """Whether there is nothing left to find."""
        return self.wrong is not None or time.monotonic() > self._deadline

    def call(
        self, known: Known | None, op: FusedOp, leading: Sequence[Any], tensors: Mapping[str, Any]
    ) -> None:
        """Make a call, and judge it if that is possible. What the op raises is a finding, and is raised."""
        recorded = None if known is None or self.done else self._record(known, tensors)
        before = copied(tensors.get("cache")) if recorded else None
        try:
            op(*leading, **tensors)
        except BackendError:  # a refusal
            raise
        except Exception as error:
            if recorded is not None:  # what it wrote may be out of reach by now
                self.wrong = JudgedCall(recorded, Made({}), expected(recorded), raised(error))
            raise
        if recorded is None:
            return
        self._synchronize()
        outcome, right = made(recorded, op, tensors, before), expected(recorded)
        self.judged += 1
        reason = judged(recorded, outcome, right)
        alone, again, reasons = None, None, ""
        if before is not None or tensors.get("cache") is None:  # there is room for a second cache
            # What is wrong by itself as well has no call before it to blame; otherwise it depends on state.
            device = next(tensor.device for tensor in tensors.values() if torch.is_tensor(tensor))
            with contextlib.suppress(BackendError):  # refused this time: what was found still counts
                reasons, again = attempted(recorded, op, device, self._synchronize, right)
                alone = bool(reasons)
            if again is not None and not reason:  # what it writes beside its outputs is seen there alone
                outcome, reason = again, reasons
        self._beat()
        if reason:
            self.wrong = JudgedCall(recorded, outcome, right, reason, alone)
        else:
            self.last = JudgedCall(recorded, outcome, right, reason)

    def _record(self, known: Known, tensors: Mapping[str, Any]) -> RecordedCall | None:
        if self._poisons:
            poison_outputs(tensors)
        try:
            return record(known, tensors, self.lengths)
        except TooLarge as error:
            self.reason = self.reason or str(error)
            return None


# What a watched op has of the op itself.
ITS_OWN = (
    *("contract", "compiles", "nan_safe_tail", "cache_formats", "encodes_rounded", "writes_lse"),
    *("lse_optional", "scores_in_bf16", "preflight", "unsupported_batch", "pack", "unpack"),
)


class Watched(FusedOp):
    """Stands in for an op of the backend; all else is the op's own."""

    def __init__(
        self, role: str, name: str, op: FusedOp, watcher: Watcher, spec: Any = None, reads_lse: bool = True
    ) -> None:
        """`reads_lse`: whether anybody does, so that it matters."""
        self._role, self._name, self._op, self._watcher = role, name, op, watcher
        self._reads_lse = reads_lse
        self._spec = spec  # of attention; the last that was asked about
        for attribute in ITS_OWN:
            setattr(self, attribute, getattr(op, attribute))

    def __getattr__(self, name: str) -> Any:
        if name == "_op":  # not yet there, in a copy
            raise AttributeError(name)
        return getattr(self._op, name)

    @property
    def remarks(self) -> Sequence[str]:  # type: ignore[override]  # which may grow while it runs
        return self._op.remarks

    def unsupported_reasons(self, spec: Any) -> list[str]:
        self._spec = spec
        return self._op.unsupported_reasons(spec)

    def prepare(self, spec: Any, batch: Any) -> Any:
        self._spec = spec
        return Prepared(self._op.prepare(spec, batch), batch)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        unwrapped = tuple(state.state if isinstance(state, Prepared) else state for state in leading)
        self._watcher.call(self._known(leading, tensors), self._op, unwrapped, tensors)

    def _known(self, leading: Sequence[Any], tensors: Mapping[str, Any]) -> Known | None:
        """Return what the tensors do not say; None if it is not known either."""
        kind, weight, lengths, spec = self.contract.partition("/")[0], None, None, self._spec
        if KINDS[kind].packed:
            weight = self._op.unpack(leading[0])
            groups = weight.shape[0] if weight.dim() == 3 else 1
            spec = LinearSpec(weight.shape[-1], weight.shape[-2], groups, weight.dtype, weight.device)
        elif kind == "rms_norm":
            x = tensors["x"]
            spec = NormSpec(x.shape[-1], x.dtype, x.device)
        elif kind == "expanded_attention":
            batch = getattr(leading[0], "batch", None) if isinstance(leading[0], Prepared) else leading[0]
            if not isinstance(batch, SegmentLengths):
                return None
            lengths = batch
        if spec is None:
            return None
        return Known(kind, self._role, self._name, spec, weight, lengths, self.writes_lse and self._reads_lse)


# ----------------------------------------------------------------------------------------------- the verdict

# Whether a recorded call was right: its results against float64, and the memory around them.


@dataclass(frozen=True)
class Made:
    """What a call left behind, on the host."""

    results: Tensors
    damage: str = ""  # what was written besides, as a clause


@dataclass(frozen=True)
class Expected:
    """What a call must write: float64, and the reference's own results in the op's dtype."""

    truth: Tensors
    reference: Tensors


def make(
    call: RecordedCall, op: FusedOp, device: torch.device, synchronize: Callable[[], None] = lambda: None
) -> Made:
    """Make a recorded call on a device, in fresh memory of the same layout."""
    pieces, arguments = placed(call, device)
    before = copied(arguments.get("cache"))
    op(*call.leading(op, call.spec(device), arguments), **arguments)
    synchronize()
    return made(call, op, arguments, before, pieces)


def copied(cache: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy of a cache on its device, to find stray writes; None if it is too large."""
    return None if cache is None or cache.nbytes > MAX_CALL_BYTES else cache.clone()


def made(
    call: RecordedCall,
    op: FusedOp,
    arguments: Mapping[str, Any],
    before: torch.Tensor | None,
    pieces: Mapping[str, Piece] = MappingProxyType({}),
) -> Made:
    """Return what a call that has been made left in its memory.

    `before` is the cache before it, if known; `pieces`: the memory of operands, if nobody else writes there.
    """
    inputs = call.operands.keys() & arguments.keys() - ({"x"} if call.facts.in_place else set())
    clauses = [
        f"the op wrote to its input {name}"
        for name in sorted(inputs)
        if not bool(same_numbers(arguments[name].cpu(), call.operands[name]).all())
    ]
    clauses += filter(None, (piece.damage(name, output=True) for name, piece in pieces.items()))
    if before is not None:
        now, then = (call.entry.by_token(cache) for cache in (arguments["cache"], before))
        count, first = changed_slots(now, then, arguments.get("slots"))
        clause = f"{count} slots of the cache have changed that are not written; the first is {first}"
        clauses += [clause] * bool(count)
    held = {*call.entry.judged(op)} - ({"lse"} if not call.facts.writes_lse else set())
    written = call.entry.written(arguments)
    results = {name: rows.to("cpu", copy=True) for name, rows in written.items() if name in held}
    return Made(results, "; ".join(clauses))


# ------------------------------------------------------------------------------------------- the truth


def expected(call: RecordedCall) -> Expected:
    """Compute what a call must write, on the host."""
    host, case = torch.device("cpu"), call.case
    given = call.entry.given(call.arguments(call.operands, host), case.lengths)
    reference = make(call, REFERENCE[case.kind], host).results
    return Expected(call.entry.truth(case.spec, given, case.lengths), reference)


def judged(call: RecordedCall, outcome: Made, right: Expected) -> str:
    """Return why a call was wrong; "" if it was right."""
    errors = call.entry.errors(right.reference, right.truth)
    where = places(call)
    return call.entry.judge(outcome.results, right.truth, errors, call.dtype, where, outcome.damage).reason


def attempted(
    call: RecordedCall, op: FusedOp, device: torch.device, synchronize: Callable[[], None], right: Expected
) -> tuple[str, Made | None]:
    """Make a recorded call; return why it was wrong, "" if it was right, and what it left unless it raised.

    Raises `BackendError` where the op refuses.
    """
    try:
        outcome = make(call, op, device, synchronize)
    except BackendError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever an op raises
        return raised(error), None
    return judged(call, outcome, right), outcome


def raised(error: Exception) -> str:
    """Return why a call was wrong that ended in an exception."""
    return f"it raised {describe(error)}"


def places(call: RecordedCall) -> Places | None:
    """Return where the rows of a call are, if that is known: of the op of a part of a batch it is not."""
    if not call.facts.query_lens:
        return None
    return call.case.places(call.operands.get("block_table"))
