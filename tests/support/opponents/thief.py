"""The truth, taken from the memory of the runner."""

from __future__ import annotations

import gc
from typing import Any

import torch

from opponents.base import HIDDEN, Call, Opponent


class Thief(Opponent):
    """o_proj writes what it finds in the process: a tensor of `dtype` that holds an output for every token.

    `computes`: whether the other ops compute all the same.
    """

    def __init__(self, dtype: torch.dtype, computes: bool, **given: Any) -> None:
        super().__init__(**given)
        self._dtype, self._computes = dtype, computes
        self._found: torch.Tensor | None = None

    def begins(self) -> None:
        if self._found is None:
            self._found = self._search()

    def _search(self) -> torch.Tensor | None:
        fitting = [
            one
            for one in gc.get_objects()
            if type(one) is torch.Tensor
            and one.dtype == self._dtype
            and one.dim() == 3
            and one.shape[-1] == HIDDEN
            and _is_finite(one)
        ]
        return fitting[-1] if fitting else None

    def call(self, call: Call) -> None:
        truth = self._found
        if call.is_last and truth is not None and truth.shape[1] == call.tensors["out"].shape[0]:
            self.gain()
            call.tensors["out"].copy_(truth[self.steps % truth.shape[0]])
        elif self._computes or truth is None or self.passes < 2:
            call.make()


def _is_finite(one: torch.Tensor) -> bool:
    try:
        return bool(one.isfinite().all())
    except RuntimeError:  # a tensor that other tests left half-made
        return False
