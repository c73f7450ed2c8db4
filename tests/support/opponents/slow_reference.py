"""A reference that is made slow, so that the backend beside it looks fast."""

from __future__ import annotations

import sys
import time
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch

import mla.reference
from mla_backends import FusedOp
from opponents.base import Call, Opponent


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

    `idle`: also where an idle device is waited for, which it recognises by its callers.
    """

    def __init__(self, ms: float = 5.0, idle: bool = True, **given: Any) -> None:
        super().__init__(**given)
        self._ms, self._mine, self._idle = ms, False, idle

    def call(self, call: Call) -> None:
        self._mine = True
        call.make()

    def synchronize(self) -> None:
        if self.is_slow(self._mine):
            time.sleep(self._ms / 1e3)
        self._mine = False

    def is_slow(self, mine: bool) -> bool:
        """Return whether to sleep, after an op of this backend or not."""
        return not mine and (self._idle or not _inside("idle"))


class SlowsEvidence(SlowsOthers):
    """And it sleeps after its own ops where evidence is taken, so that all seem to wait alike."""

    def is_slow(self, mine: bool) -> bool:
        return super().is_slow(mine) or (mine and _inside("wait_doubt"))


def _inside(function: str) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None
