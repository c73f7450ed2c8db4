"""A reference that is made slow, so that the backend beside it looks fast."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import torch

import mla.reference
from mla_backends import FusedOp
from opponents.base import Call, Opponent, _now


class _Slow(FusedOp):
    """An op that sleeps first."""

    nan_safe_tail = lse_optional = True

    def __init__(self, right: FusedOp, ms: float) -> None:
        self._right, self._ms, self.contract = right, ms, right.contract

    def pack(self, weight: torch.Tensor) -> Any:
        return self._right.pack(weight)

    def unpack(self, packed: Any) -> torch.Tensor:
        return self._right.unpack(packed)

    def prepare(self, spec: Any, batch: Any) -> Any:
        return self._right.prepare(spec, batch)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        time.sleep(self._ms / 1e3)
        self._right(*leading, **tensors)


class PatchedReference(Opponent):
    """Puts slow ops in the place of the reference's. `how`: "table", its dictionary; "class", their calls."""

    def __init__(self, how: str, ms: float = 2.0, **given: Any) -> None:
        super().__init__(**given)
        self._how, self._ms = how, ms

    def arrives(self) -> None:
        table = dict(mla.reference.REFERENCE)
        if self._how == "table":
            slow = {kind: _Slow(op, self._ms) for kind, op in table.items()}
            self.patches.enter_context(patch.dict(mla.reference.REFERENCE, slow))
            return
        for op in table.values():
            self.patches.enter_context(patch.object(type(op), "__call__", _sleeping(type(op), self._ms)))

    def call(self, call: Call) -> None:
        right = getattr(type(call.op.right).__call__, "right", None)
        if right is None:
            call.make()
        else:
            right(call.op.right, *call.leading, **call.tensors)


def _sleeping(kind: Any, ms: float) -> Any:
    right = kind.__call__

    def slow(op: FusedOp, *leading: Any, **tensors: Any) -> None:
        time.sleep(ms / 1e3)
        right(op, *leading, **tensors)

    slow.right = right  # type: ignore[attr-defined]
    return slow


class SlowsOthers(Opponent):
    """Patches nothing: `synchronize` sleeps when no op of this backend was called since the last time.

    `unless`: and if that was longer ago, in milliseconds; an idle device is waited for in no time then.
    """

    def __init__(self, ms: float = 5.0, unless: float = 0.0, **given: Any) -> None:
        super().__init__(**given)
        self._ms, self._mine, self._unless, self._last = ms, False, unless, _now()

    def call(self, call: Call) -> None:
        self._mine = True
        call.make()

    def synchronize(self) -> None:
        if not self._mine and _now() - self._last > 1e6 * self._unless:
            time.sleep(self._ms / 1e3)
        self._mine, self._last = False, _now()
