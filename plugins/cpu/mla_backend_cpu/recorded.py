"""A forward's calls of the kernels, written down once and made again as one.

Handing a call its two dozen arguments costs Python as much as a small kernel takes, on every step anew.
"""

from __future__ import annotations

import copy
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mla_backend_cpu.library import SIGNATURES
from mla_backend_cpu.native_attention import NativeLatentAttention
from mla_backend_cpu.native_ops import (
    NativeBatchedLinear,
    NativeLinear,
    NativeOp,
    NativeRmsNorm,
    NativeRotateQuery,
    NativeWriteLatent,
    check,
    is_direct,
    threads,
)
from mla_backends.api import OpCall

if TYPE_CHECKING:
    import torch

#: Ops that do nothing beside one call of a kernel; a subclass may.
_RECORDABLE = {
    NativeLinear,
    NativeBatchedLinear,
    NativeRmsNorm,
    NativeRotateQuery,
    NativeWriteLatent,
    NativeLatentAttention,
}
#: The name of a function and its arguments.
Made = tuple[str, tuple[Any, ...]]


def sequence(calls: Sequence[OpCall], moving: Sequence[torch.Tensor]) -> Callable[..., None] | None:
    """Return `calls` as one (see `Backend.sequence`); None where one of them cannot be made from a record."""
    ops = [call.op for call in calls if isinstance(call.op, NativeOp) and type(call.op) in _RECORDABLE]
    if len(ops) < len(calls) or len({op.kernels.level for op in ops}) != 1:
        return None
    if not all(is_direct(tensor) for tensor in _tensors(calls)):
        return None  # a copy of such a tensor would be the record's, not the step's
    made = _write_down(ops, calls)
    return Recorded(ops[0].kernels.functions, made, calls, moving)


def _tensors(calls: Sequence[OpCall]) -> list[torch.Tensor]:
    return [value for call in calls for value in call.tensors.values() if hasattr(value, "data_ptr")]


def _write_down(ops: Sequence[NativeOp], calls: Sequence[OpCall]) -> list[Made]:
    """Return the functions that these calls call, and their arguments."""
    recorder = _Recorder()
    for op, call in zip(ops, calls, strict=True):
        writing: Any = copy.copy(op)
        writing.functions = recorder
        writing(*call.arguments, **call.tensors)
    return recorder.calls


class _Recorder:
    """Stands for the functions of a library and writes down how they are called."""

    def __init__(self) -> None:
        self.calls: list[Made] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, arguments))


class Recorded:
    """Records as `native/recorded.h` reads them, and where the addresses of moving tensors stand in them."""

    def __init__(
        self, functions: Any, made: Sequence[Made], calls: Sequence[OpCall], moving: Sequence[torch.Tensor]
    ) -> None:
        self._run = functions.mla_run_recorded
        self._count = len(made)
        self._records = array("q")
        addresses: list[int] = []  # which of the records are some
        for name, arguments in made:
            letters = SIGNATURES[name].replace(" ", "")
            self._records.extend((functions.mla_recorded(name.encode()), len(letters)))
            addresses += [len(self._records) + i for i, letter in enumerate(letters) if letter == "p"]
            self._records.extend(map(_slot, letters, arguments))
        self._begin = self._records.buffer_info()[0]
        starts = [tensor.data_ptr() for tensor in moving]
        self._places = [[i for i in addresses if self._records[i] == start] for start in starts]
        tensors = [tensor for tensor in _tensors(calls) if tensor.data_ptr() not in starts]
        self._kept = (tensors, [call.arguments for call in calls])  # what the records point to

    def __call__(self, *moved: torch.Tensor) -> None:
        for places, tensor in zip(self._places, moved, strict=True):
            for place in places:
                self._records[place] = tensor.data_ptr()
        check(self._run(self._begin, self._count, threads()))


def _slot(letter: str, value: Any) -> int:
    """Return an argument as the 64 bits that a record holds."""
    if letter == "f":
        return int(struct.unpack("q", struct.pack("f4x", value))[0])
    return 0 if value is None else int(value)
