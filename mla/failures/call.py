"""One call of an op, recorded before it was made: a case, and its operands as they lay in memory.

A recorded call can be made again and judged. Ops that are watched have each call recorded, made and judged,
until the first one that is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from mla.cases import KINDS
from mla.cases.case import Kind, OpCase, entry_of
from mla.cases.memory import (
    ALIGNED,
    NO_GAPS,
    Gaps,
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
from mla_backends import host
from mla_backends.api import FusedOp, LinearSpec, NormSpec, SegmentLengths
from mla_backends.errors import BackendError, describe

# A call that reads more is not kept.
MAX_CALL_BYTES = 2 << 30
CONTEXT = "kv_b_proj"  # the role whose rows are all cached tokens
OUTPUTS = ("out", "lse")  # what an op writes, besides the cache
CPU = torch.device("cpu")
Lengths = tuple[Sequence[int], Sequence[int]]  # per request: new tokens, and keys
Wait = Callable[[], None]  # for the device
Left = tuple[Tensors, str]  # by a call, on the host: its results, and what was written besides, as a clause


class TooLarge(MLAError):
    """A call that reads more than is kept."""


class CallFacts(msgspec.Struct, kw_only=True):
    """What is not a tensor. What is known before the call comes first; `record` adds the rest."""

    kind: str  # of op
    role: str  # in the layer; that of an op alone is its kind
    op: str  # the name that the backend gave it
    spec: dict[str, Any]
    query_lens: list[int] = []
    kv_lens: list[int] = []
    causal: bool = True
    writes_lse: bool = True
    scalars: dict[str, float | bool | str] = {}
    absent: list[str] = []  # arguments that were None
    outputs: dict[str, list[int]] = {}  # the shapes of those that the call was given
    gaps: dict[str, Gaps] = {}  # of operands and outputs, where there are any: as in `Layout.gaps`
    in_place: bool = False  # the output was the input
    pages: int = 0  # of the cache

    @classmethod
    def of(cls, kind: str, role: str, op: str, spec: Any, **known: Any) -> CallFacts:
        """Return the facts of a call of an op with this spec."""
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        fields |= {"dtype": dtype_name(spec.dtype), "device": ""}
        return cls(kind=kind, role=role, op=op, spec=fields, **known)


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
    def entry(self) -> Kind:
        """The entry of the call's kind."""
        spec = self.facts.spec
        return entry_of(self.facts.kind, spec.get("cache_format") or spec.get("index_format", ""))

    @cached_property
    def case(self) -> OpCase:
        """The call without its operands, on the host."""
        facts = self.facts
        layout = Layout(1 if self.pages is None else self.pages.shape[1], gaps=facts.gaps)
        keys = tuple(facts.kv_lens)
        new = keys if facts.role == CONTEXT else tuple(facts.query_lens)
        return OpCase(facts.kind, self.spec(CPU), new, keys, causal=facts.causal, layout=layout)

    def spec(self, device: torch.device) -> Any:
        """Return the spec on a device."""
        fields = self.facts.spec
        return self.entry.spec(**{**fields, "dtype": getattr(torch, fields["dtype"]), "device": device})

    @cached_property
    def truth(self) -> Tensors:
        """What the call must write, in float64."""
        given = self.entry.given(self._arguments(self.operands, CPU), self.case.lengths)
        return self.entry.truth(self.case.spec, given, self.case.lengths)

    def expect(self) -> None:
        """Compute what the call is judged by, which else `judge` does."""
        assert self._errors is not None

    @cached_property
    def _errors(self) -> Tensors:
        """The errors of the reference, by which those of an op are judged."""
        return self.entry.errors(self.make(REFERENCE[self.facts.kind], CPU)[0], self.truth)

    def _arguments(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
        """Return the arguments of the call: these tensors, the scalars, and a cache, else NaN."""
        given: dict[str, Any] = {**tensors, **self.facts.scalars, **dict.fromkeys(self.facts.absent)}
        if self.pages is None or self.kept_pages is None:
            return given
        shape, dtype = (self.facts.pages, *self.pages.shape[1:]), self.pages.dtype
        cache = torch.full(shape, stands_for(torch.nan, dtype), dtype=dtype, device=device)
        cache[self.kept_pages.to(device)] = self.pages.to(device)
        return {**given, "cache": cache}

    def _shapes(self) -> dict[str, tuple[torch.Size, torch.dtype, Gaps]]:
        """Return shape, dtype and gaps of every tensor given, but for a packed weight and the cache."""
        facts, packed = self.facts, {"weight"} if self.entry.packed else set[str]()
        shapes = {name: (x.shape, x.dtype) for name, x in self.operands.items() if name not in packed}
        shapes |= {name: (torch.Size(shape), self.case.dtype(name)) for name, shape in facts.outputs.items()}
        return {name: (*known, facts.gaps.get(name, NO_GAPS)) for name, known in shapes.items()}

    @property
    def placed_bytes(self) -> int:
        """How much memory the call takes without its cache: gaps included, and once more (`Piece.seal`)."""
        return 2 * sum(
            (gaps[0] + shape[0] * strides(shape, gaps)[0]) * dtype.itemsize
            for shape, dtype, gaps in self._shapes().values()
        )

    def _placed(self, device: torch.device) -> tuple[dict[str, Piece], dict[str, Any]]:
        """Return the call's memory on a device by name, strided as it was, and its arguments.

        Nobody may write beside it: there is NaN, and beside tables a valid entry, so that an op which reads
        too far gives a wrong result and no invalid address.
        """
        pieces: dict[str, Piece] = {}
        for name, (shape, dtype, gaps) in self._shapes().items():
            operand, fill = self.operands.get(name), torch.nan
            if operand is not None and operand.numel() and not operand.is_floating_point():
                fill = operand.flatten()[-1].item()
            piece = pieces[name] = Piece(shape, dtype, device, gaps, fill=fill)
            poison(piece.part) if operand is None else piece.part.copy_(operand)
            piece.seal()
        arguments = self._arguments({name: piece.part for name, piece in pieces.items()}, device)
        return pieces, arguments | ({"out": arguments["x"]} if self.facts.in_place else {})

    def make(self, op: FusedOp, device: torch.device, synchronize: Wait = lambda: None) -> Left:
        """Make the call on a device, in fresh memory of the same layout."""
        spec, (pieces, arguments) = self.spec(device), self._placed(device)
        before, leading = copied(arguments.get("cache")), list[Any]()
        if self.entry.packed:
            leading = [op.pack(self.operands["weight"].to(device, copy=True))]
        elif (batch := self.entry.batch(arguments, self.case.lengths)) is not None:
            leading = [op.prepare(spec, batch)]
        op(*leading, **arguments)
        synchronize()
        return self.left(op, arguments, before, pieces)

    def left(
        self,
        op: FusedOp,
        arguments: Mapping[str, Any],
        before: torch.Tensor | None,
        pieces: Mapping[str, Piece] = MappingProxyType({}),
    ) -> Left:
        """Return what the call, which has been made, left in its memory.

        `before` is the cache before it, if known; `pieces`: the memory of operands, if nobody else writes
        there.
        """
        inputs = self.operands.keys() & arguments.keys() - ({"x"} if self.facts.in_place else set())
        clauses = [
            f"the op wrote to its input {name}"
            for name in sorted(inputs)
            if not bool(same_numbers(arguments[name].cpu(), self.operands[name]).all())
        ]
        clauses += filter(None, (piece.damage(name, output=True) for name, piece in pieces.items()))
        if before is not None:
            now, then = (self.entry.by_token(cache) for cache in (arguments["cache"], before))
            count, first = changed_slots(now, then, arguments.get("slots"))
            clause = f"{count} slots of the cache have changed that are not written; the first is {first}"
            clauses += [clause] * bool(count)
        held = {*self.entry.judged(op)} - ({"lse"} if not self.facts.writes_lse else set())
        written = self.entry.written(arguments)
        results = {name: rows.to("cpu", copy=True) for name, rows in written.items() if name in held}
        return results, "; ".join(clauses)

    def judge(self, results: Tensors, damage: str) -> str:
        """Return why the call was wrong that has left this; "" if it was right."""
        places = self.case.places(self.operands.get("block_table")) if self.facts.query_lens else None
        dtype = self.case.spec.dtype
        return self.entry.judge(results, self.truth, self._errors, dtype, places, damage).reason

    def attempt(self, op: FusedOp, device: torch.device, synchronize: Wait) -> JudgedCall:
        """Make the call and judge it; what the op raises is wrong. Raises `BackendError` where it refuses."""
        try:
            left = self.make(op, device, synchronize)
        except BackendError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever an op raises
            return JudgedCall(self, {}, raised(error))
        return JudgedCall(self, left[0], self.judge(*left))


@dataclass(frozen=True)
class JudgedCall:
    """A call, its results on the host, and why they were wrong."""

    call: RecordedCall
    results: Tensors  # none if it raised
    reason: str  # "": it was right
    alone: bool | None = None  # whether it is wrong as well when it is made again, with no call before it


def copied(cache: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy of a cache on its device, to find stray writes; None if it is too large."""
    return None if cache is None or cache.nbytes > MAX_CALL_BYTES else cache.clone()


def raised(error: Exception) -> str:
    """Return why a call was wrong that ended in an exception."""
    return f"it raised {describe(error)}"


# ---------------------------------------------------------------------------------------------- recording


def record(
    facts: CallFacts,
    tensors: Mapping[str, Any],
    weight: torch.Tensor | None = None,
    of_step: Lengths | None = None,
) -> RecordedCall:
    """Copy a call to the host before it is made. Raises `TooLarge` beyond `MAX_CALL_BYTES`, or free memory.

    `tensors` are the arguments by name, scalars included. `of_step`: new tokens and keys per request, to name
    the rows of ops that are not told. Waits for the device.
    """
    given = {name: x for name, x in tensors.items() if torch.is_tensor(x) and name != "cache"}
    inputs = {name: x for name, x in given.items() if name not in OUTPUTS}
    inputs |= {} if weight is None else {"weight": weight.detach()}
    cache = tensors.get("cache")
    kept = None if cache is None else KINDS[facts.kind].touched(tensors, cache.shape[1])
    needed = sum(x.nbytes for x in inputs.values())
    needed += 0 if cache is None or kept is None else len(kept) * cache[0].nbytes
    if needed > MAX_CALL_BYTES:
        raise TooLarge(
            f"a call of {facts.role} reads {size(needed)}, more than the {size(MAX_CALL_BYTES)} that are "
            "kept: choose a smaller shape."
        )
    if not facts.query_lens:
        facts.query_lens, facts.kv_lens = _lengths(facts, tensors, of_step)
    places = [(x.data_ptr(), x.device, x.shape) for x in inputs.values() if x.numel()]
    out = given.get("out")
    facts.in_place = out is not None and (out.data_ptr(), out.device, out.shape) in places
    facts.scalars = {name: x for name, x in tensors.items() if isinstance(x, (bool, int, float, str))}
    facts.absent = [name for name, x in tensors.items() if x is None]
    written = [name for name in OUTPUTS if name in given and not facts.in_place]
    facts.outputs = {name: list(given[name].shape) for name in written}
    facts.gaps = {name: gaps for name, x in given.items() if any(gaps := gaps_of(x))}
    operands = {name: x.to("cpu", copy=True).contiguous() for name, x in inputs.items()}
    pages = None
    if cache is not None and kept is not None:
        facts.pages, pages = cache.shape[0], cache[kept.to(cache.device)].cpu()
    call = RecordedCall(facts, operands, kept, pages)
    free = host.memory_available()
    if free is not None and call.placed_bytes > free:  # the reference makes it again, in the same layout
        taken = f"takes {size(call.placed_bytes)} with its strides, and {size(free)} of memory are free"
        raise TooLarge(f"a call of {facts.role} {taken}: free more.")
    return call


def _lengths(
    facts: CallFacts, tensors: Mapping[str, Any], of_step: Lengths | None
) -> tuple[list[int], list[int]]:
    """Return new tokens and keys per request: of the call's own tables, or of the step if its rows fit."""
    if "cu_q" in tensors:
        return tensors["cu_q"].cpu().diff().tolist(), tensors["kv_lens"].cpu().tolist()
    rows = tensors[KINDS[facts.kind].varied[0]].shape[0]
    if of_step is None or sum(of_step[facts.role == CONTEXT]) != rows:
        return [], []
    return list(of_step[0]), list(of_step[1])


def gaps_of(tensor: torch.Tensor) -> Gaps:
    """Return the gaps of a tensor, as in `Layout.gaps`; none where its strides are not of that form.

    Numbers before the first, modulo the alignment, and behind each row and each part of up to three
    dimensions.
    """
    shape, gaps, usual = tensor.shape, [0, 0], 1
    if not 0 < tensor.dim() <= 3 or (shape[-1] > 1 and tensor.stride(-1) != 1):
        return NO_GAPS
    for dim in range(tensor.dim() - 2, -1, -1):
        usual *= max(1, shape[dim + 1])
        stride = tensor.stride(dim) if shape[dim] > 1 else usual
        gaps[min(dim, 1)], usual = stride - usual, stride
    return (int(tensor.storage_offset()) % ALIGNED, gaps[0], gaps[1]) if min(gaps) >= 0 else NO_GAPS


def poison_outputs(tensors: Mapping[str, Any]) -> None:
    """Poison `out` and `lse`, unless they share memory with what the op reads."""
    memory = {
        name: (str(x.device), x.untyped_storage().data_ptr())
        for name, x in tensors.items()
        if torch.is_tensor(x)
    }
    read = {place for name, place in memory.items() if name not in OUTPUTS}
    for name in OUTPUTS:
        if name in memory and memory[name] not in read:
            poison(tensors[name])


# ------------------------------------------------------------------------------------------------ watched ops


# Seconds after which calls are made without being judged: the oracle may take a while.
JUDGING_S = 120.0


class Watcher:
    """Judges the calls of the ops that it has given out."""

    def __init__(
        self, synchronize: Wait, beat: Callable[[], None] = lambda: None, poisons: bool = True
    ) -> None:
        """`beat` is called after every call that was judged. `poisons`: outputs, before every call."""
        self._synchronize, self._beat, self._poisons = synchronize, beat, poisons
        self._deadline = time.monotonic() + JUDGING_S
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
        self,
        facts: CallFacts | None,
        weight: torch.Tensor | None,
        op: FusedOp,
        leading: Sequence[Any],
        tensors: Mapping[str, Any],
    ) -> None:
        """Make a call, and judge it if that is possible. What the op raises is a finding, and is raised.

        `facts`: None where the tensors do not say enough.
        """
        recorded = None if facts is None or self.done else self._record(facts, tensors, weight)
        before = copied(tensors.get("cache")) if recorded else None
        try:
            op(*leading, **tensors)
        except BackendError:  # a refusal
            raise
        except Exception as error:
            if recorded is not None:  # what it wrote may be out of reach by now
                self.wrong = JudgedCall(recorded, {}, raised(error))
            raise
        if recorded is None:
            return
        self._synchronize()
        self.judged += 1
        judged = self._judged(recorded, op, tensors, before)
        self._beat()
        if judged.reason:
            self.wrong = judged
        else:
            self.last = judged

    def _record(
        self, facts: CallFacts, tensors: Mapping[str, Any], weight: torch.Tensor | None
    ) -> RecordedCall | None:
        if self._poisons:
            poison_outputs(tensors)
        try:
            return record(facts, tensors, weight, self.lengths)
        except TooLarge as error:
            self.reason = self.reason or str(error)
            return None

    def _judged(
        self, call: RecordedCall, op: FusedOp, tensors: Mapping[str, Any], before: torch.Tensor | None
    ) -> JudgedCall:
        """Judge a call that was made, and make it once more, alone: then what it depends on is known."""
        results, damage = call.left(op, tensors, before)
        judged = JudgedCall(call, results, call.judge(results, damage))
        if before is not None or tensors.get("cache") is None:  # there is room for a second cache
            device = next(tensor.device for tensor in tensors.values() if torch.is_tensor(tensor))
            with contextlib.suppress(BackendError):  # refused this time: what was found still counts
                again = call.attempt(op, device, self._synchronize)
                # Writes beside its outputs are seen there alone.
                shown = again if again.results and not judged.reason else judged
                return dataclasses.replace(shown, alone=bool(again.reason))
        return judged


@dataclass(frozen=True)
class Prepared:
    """A prepared state, and the lengths it was prepared for."""

    state: Any
    batch: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)


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
        self._watcher.call(*self._known(leading, tensors), self._op, unwrapped, tensors)

    def _known(
        self, leading: Sequence[Any], tensors: Mapping[str, Any]
    ) -> tuple[CallFacts | None, torch.Tensor | None]:
        """Return what the tensors do not say, None if it is not known either; and a weight."""
        kind, weight, spec = self.contract.partition("/")[0], None, self._spec
        known: dict[str, Any] = {"writes_lse": self.writes_lse and self._reads_lse}
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
                return None, None
            lengths = {"query_lens": list(batch.query_lens), "kv_lens": list(batch.kv_lens)}
            known |= {**lengths, "causal": batch.causal}
        return None if spec is None else CallFacts.of(kind, self._role, self._name, spec, **known), weight
