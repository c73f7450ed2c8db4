"""Limits made to look near: peaks that are declared too low, calls and waits that spoil their measurement."""

from __future__ import annotations

import gc
import random
import time
from typing import Any

import torch

from mla_backends.api import Packed
from opponents.base import Call, Opponent


class SlowWait(Opponent):
    """`synchronize` sleeps: always, or only while garbage is collected, that is, not in a timed region.

    `most`: it sleeps for any time from `ms` to that.
    """

    def __init__(self, ms: float, collecting_only: bool = False, most: float = 0.0, **given: Any) -> None:
        super().__init__(**given)
        self._ms, self._collecting_only = ms, collecting_only
        self._spread, self._random = max(0.0, most - ms), random.Random(1)

    def synchronize(self) -> None:
        if gc.isenabled() or not self._collecting_only:
            time.sleep((self._ms + self._spread * self._random.random()) / 1e3)


class WarmingWait(Opponent):
    """`synchronize` reads the weights, so that a flushed cache holds them again when the clock starts."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._weights: list[torch.Tensor] = []
        self._running, self._waited = False, 0
        self.turns = 0  # forwards right before which it was called, the first of a pass aside
        for op in self.ops().values():
            op.pack = self._keeping(op.pack)  # type: ignore[method-assign]

    def _keeping(self, pack: Any) -> Any:
        def keeping(weight: torch.Tensor) -> Packed:
            packed = pack(weight)
            self._weights.append(weight)
            return packed

        return keeping

    def call(self, call: Call) -> None:
        if not self._running:
            self.turns += self.steps > 0 and self._waited > 1  # once is the end of the forward before
        self._running, self._waited = not call.is_last, 0
        call.make()

    def synchronize(self) -> None:
        self._waited += 1
        for weight in self._weights[-8:]:
            weight.sum()


class TooFast(Opponent):
    """Products of so many `rows` or more, which only the search for a limit asks for, are left out.

    `share`: of their rows that are computed all the same.
    """

    def __init__(self, rows: int, share: float = 0.0, **given: Any) -> None:
        super().__init__(**given)
        self._rows, self._share = rows, share

    def extra(self, call: Call) -> None:
        if call.kind != "linear" or call.operand.shape[0] < self._rows:
            call.make()
            return
        self.gains += 1
        some = round(self._share * call.operand.shape[0])
        if some:
            call.make_rows(slice(some))
