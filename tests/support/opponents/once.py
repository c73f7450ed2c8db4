"""One op alone (`--op`), computed less often than it is called."""

from __future__ import annotations

from typing import Any

from opponents.base import Call, Opponent


class ComputedOnce(Opponent):
    """Computes a call unless `skips` says that its result is there already.

    "filled": where out is finite. "after N": all but the first N calls of a row of equal ones (same memory).
    "every N": all but every Nth.
    """

    def __init__(self, kind: str, skips: str, **given: Any) -> None:
        super().__init__(kinds=(kind,), **given)
        self._rule, _, number = skips.partition(" ")
        self._number = int(number or 0)
        self._calls = 0

    def call(self, call: Call) -> None:
        out = call.tensors["out"]
        if self._rule == "filled":
            skip = bool(out.flatten()[0].isfinite())
        elif self._rule == "after":
            self._calls = self._calls + 1 if out.flatten()[0].isfinite() else 1
            skip = self._calls > self._number
        else:
            self._calls += 1
            skip = self._calls > 3 and self._calls % self._number > 0
        if skip:
            self.gains += 1
        else:
            call.make()
