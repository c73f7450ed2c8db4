"""Ops that are watched: each call is recorded, made, and judged, until the first one that is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla.cases import KINDS
from mla.cases.memory import Tensors, changed_slots, same_numbers
from mla.failures.call import (
    MAX_CALL_BYTES,
    Known,
    Lengths,
    Placed,
    RecordedCall,
    TooLarge,
    poison_outputs,
    record,
)
from mla.reference import REFERENCE
from mla.verify.places import Places
from mla_backends.api import FusedOp, LinearSpec, NormSpec, SegmentLengths
from mla_backends.errors import BackendError, describe

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
            self._raised(recorded, error)
            raise
        if recorded is None:
            return
        self._synchronize()
        outcome, right = made(recorded, op, tensors, before), expected(recorded)
        self.judged += 1
        reason = judged(recorded, outcome, right)
        small = before is not None or tensors.get("cache") is None  # there is room for a second one
        again = self._again(recorded, op, tensors) if small else None
        if again is not None and not reason:  # what it writes beside its outputs is seen there alone
            outcome, reason = again, judged(recorded, again, right)
        self._beat()
        if reason:
            alone = (again is None or bool(judged(recorded, again, right))) if small else None
            self.wrong = JudgedCall(recorded, outcome, right, reason, alone)
        else:
            self.last = JudgedCall(recorded, outcome, right, reason)

    def _again(self, call: RecordedCall, op: FusedOp, tensors: Mapping[str, Any]) -> Made | None:
        """Make a call again by itself; None if it raises.

        What is wrong in both has no call before it to blame; what is wrong in the first alone depends on
        state.
        """
        device = next(tensor.device for tensor in tensors.values() if torch.is_tensor(tensor))
        try:
            return make(call, op, device, self._synchronize)
        except Exception:  # noqa: BLE001  # whatever an op raises
            return None

    def _raised(self, recorded: RecordedCall | None, error: Exception) -> None:
        """Keep a call that ended in an exception; what it wrote may be out of reach by now."""
        if recorded is not None:
            self.wrong = JudgedCall(recorded, Made({}), expected(recorded), raised(error))

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
    placed = Placed(call, device)
    arguments = placed.arguments
    before = copied(arguments.get("cache"))
    op(*call.leading(op, call.spec(device), arguments), **arguments)
    synchronize()
    return made(call, op, arguments, before, placed.damage)


def copied(cache: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy of a cache on its device, to find stray writes; None if it is too large."""
    return None if cache is None or cache.nbytes > MAX_CALL_BYTES else cache.clone()


def made(
    call: RecordedCall,
    op: FusedOp,
    arguments: Mapping[str, Any],
    before: torch.Tensor | None,
    beside: Callable[[], list[str]] = list,
) -> Made:
    """Return what a call that has been made left in its memory.

    `before` is the cache before it, if known; `beside` returns what was written beside operands.
    """
    inputs = call.operands.keys() & arguments.keys() - ({"x"} if call.facts.in_place else set())
    clauses = [
        f"the op wrote to its input {name}"
        for name in sorted(inputs)
        if not bool(same_numbers(arguments[name].cpu(), call.operands[name]).all())
    ]
    clauses += beside()
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


def raised(error: Exception) -> str:
    """Return why a call was wrong that ended in an exception."""
    return f"it raised {describe(error)}"


def places(call: RecordedCall) -> Places | None:
    """Return where the rows of a call are, if that is known: of the op of a part of a batch it is not."""
    if not call.facts.query_lens:
        return None
    return call.case.places(call.operands.get("block_table"))
