"""Nothing is computed where there is a result already: buffers that are not cleared before every forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opponents.base import Call, Opponent

# How a cheat convinces itself that a buffer is filled.
LOOKS: dict[str, Callable[[torch.Tensor], bool]] = {
    "its first number": lambda out: bool(out.flatten()[0].isfinite()),
    "its last number": lambda out: bool(out.flatten()[-1].isfinite()),
    "all of it": lambda out: bool(out.isfinite().all()),
    "any of it": lambda out: bool(out.isfinite().any()),
    "anything but zero": lambda out: bool(out.isfinite().all() and out.any()),
}


class SkipsFilled(Opponent):
    """Skips calls whose `out` is filled.

    `what`: "o_proj" alone; "scratch", every other op; "all"; or "forward": every op of a forward whose
    predecessor found the layer's output filled.
    """

    def __init__(self, what: str, look: str = "its first number", **given: Any) -> None:
        super().__init__(**given)
        self._what, self._filled = what, LOOKS[look]
        self._skips = False  # "forward": until the next output that is not filled

    def call(self, call: Call) -> None:
        if call.out is None or not self._skip(call):
            call.make()
        else:
            self.gain()

    def _skip(self, call: Call) -> bool:
        assert call.out is not None
        if self._what == "forward":
            if call.is_last:
                self._skips = self._filled(call.out)
            return self._skips
        wanted = {"o_proj": call.is_last, "scratch": not call.is_last, "all": True}[self._what]
        return wanted and self._filled(call.out)
