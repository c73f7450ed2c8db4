"""Buffers for the results of a pass: one per call where memory allows, otherwise a random choice is kept.

Whether a call's results are kept is decided when it is over, by chance that nobody can foresee: while a call
runs, it is as likely to be judged as any other of its pass.
"""

from __future__ import annotations

import random

import torch

from mla.verify.op_check import Tensors

# The most bytes of results; two buffers are made in any case.
OUTPUT_BYTES = 256 << 20
# So many numbers are kept of a pass, which bounds the time that judging them takes; but at least so many
# calls. Of 6 passes these are 48: if one call in ten goes wrong, one of them does in 99 of 100 runs.
KEPT_NUMBERS, KEPT_CALLS = 1 << 21, 8

# Bound here, before plugins are loaded.
_chance = random.SystemRandom()
_empty_like, _copy, _fill = torch.empty_like, torch.Tensor.copy_, torch.Tensor.fill_


def buffers(calls: int, numbers: int, itemsize: int) -> int:
    """Return how many buffers of so many numbers a pass of `calls` gets."""
    kept = max(KEPT_CALLS, KEPT_NUMBERS // numbers)
    affordable = max(2, OUTPUT_BYTES // (numbers * itemsize))
    return min(calls, kept + 1, affordable)


class Outputs:
    """The buffers of one implementation. `stacks`: result -> [buffers, ..] on the device."""

    def __init__(self, stacks: Tensors, calls: int) -> None:
        parts = zip(*(stack.unbind() for stack in stacks.values()), strict=True)
        self._buffers = [dict(zip(stacks, one, strict=True)) for one in parts]
        self._capacity = len(self._buffers) - (calls > len(self._buffers))  # one is free for the next call
        self.first: Tensors | None = None  # what the first call of all wrote, on the host
        self.clear()

    def clear(self) -> None:
        """Forget all calls, as a pass begins."""
        self._free = list(range(len(self._buffers)))
        self._kept: list[tuple[int, int]] = []  # index of a call, its buffer
        self._calls = 0

    def next(self) -> Tensors:
        """Return the buffer of the next call, filled with NaN."""
        found = self._buffers[self._free[0]]
        for result in found.values():
            _fill(result, torch.nan)
        return found

    def done(self, index: int) -> None:
        """Keep the results of call `index`, which wrote the buffer returned last, or not."""
        used = (index, self._free.pop(0))
        self._calls += 1
        if self.first is None:
            self.first = self._copied(used[1])
        if len(self._kept) < self._capacity:
            self._kept.append(used)
            return
        place = _chance.randrange(self._calls)
        if place < self._capacity:
            self._kept[place], used = used, self._kept[place]
        self._free.append(used[1])

    def collect(self) -> list[tuple[int, Tensors]]:
        """Return copies on the host of all that is kept, by index of the call."""
        return [(index, self._copied(buffer)) for index, buffer in sorted(self._kept)]

    def _copied(self, buffer: int) -> Tensors:
        return {
            name: _copy(_empty_like(result, device="cpu"), result)
            for name, result in self._buffers[buffer].items()
        }
