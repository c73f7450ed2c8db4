"""A forward's kernel calls, recorded once and replayed as one call.

Passing a call its two dozen arguments costs Python as much time as a small kernel takes, on every step.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mla_backend_cpu.catalog import RECORDABLE
from mla_backend_cpu.library import SIGNATURES
from mla_backend_cpu.native_ops import NativeOp, check, is_direct, operand, span, threads
from mla_backends.api import OpCall

if TYPE_CHECKING:
    import torch

Made = tuple[str, tuple[Any, ...]]  # the name of a function and its arguments


def sequence(calls: Sequence[OpCall], moving: Sequence[torch.Tensor]) -> Callable[..., None] | None:
    """Return `calls` as one (see `Backend.sequence`); None if one of them cannot be replayed."""
    ops = [call.op for call in calls if isinstance(call.op, NativeOp) and type(call.op) in RECORDABLE]
    if len(ops) < len(calls) or len({op.kernels.level for op in ops}) != 1:
        return None
    recorder = _Recorder()
    for op, call in zip(ops, calls, strict=True):  # which refuse what has no address
        writing: Any = op.calling(recorder)
        writing(*call.arguments, **call.tensors)
    if not all(is_direct(tensor) for tensor in _tensors(calls)):
        return None  # a copy of such a tensor would belong to the record, not to the step
    return Recorded(ops[0].kernels.functions, recorder.calls, calls, moving)


def _tensors(calls: Sequence[OpCall]) -> list[torch.Tensor]:
    return [value for call in calls for value in call.tensors.values() if hasattr(value, "data_ptr")]


class _Recorder:
    """Stands in for the functions of a library and records how they are called."""

    def __init__(self) -> None:
        self.calls: list[Made] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, arguments))


class Recorded:
    """Records as `native/recorded.h` reads them, and where they hold the addresses of moving tensors."""

    def __init__(
        self, functions: Any, made: Sequence[Made], calls: Sequence[OpCall], moving: Sequence[torch.Tensor]
    ) -> None:
        self._run = functions.mla_run_recorded
        self._count = len(made)
        self._records = array("q")
        addresses: list[int] = []  # indices of the records that hold addresses
        for name, arguments in made:
            letters, _ = SIGNATURES[name]
            self._records.extend((functions.mla_recorded(name.encode()), len(letters)))
            addresses += [len(self._records) + i for i, letter in enumerate(letters) if letter == "p"]
            self._records.extend(map(_slot, letters, arguments))
        self._begin = self._records.buffer_info()[0]
        self._like = [(type(x), x.shape, x.stride(), x.dtype, x.element_size(), span(x)) for x in moving]
        starts = [tensor.data_ptr() for tensor in moving]
        self._places = [[i for i in addresses if self._records[i] == start] for start in starts]
        tensors = [tensor for tensor in _tensors(calls) if tensor.data_ptr() not in starts]
        self._kept = (tensors, [call.arguments for call in calls])  # what the records point to

    def __call__(self, *moved: torch.Tensor) -> None:
        for places, tensor, like in zip(self._places, moved, self._like, strict=True):
            address = _address(tensor, *like)
            for place in places:
                self._records[place] = address
        check(self._run(self._begin, self._count, threads()))


def _address(
    x: Any, kind: Any, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, size: int, span: int
) -> int:
    """Return where x lies. Raises ValueError unless it is what was recorded: `operand`, made fast."""
    try:
        if (
            type(x) == kind  # noqa: E721  # mypy narrows x after `is`
            and x.shape == shape
            and x.stride() == stride
            and x.dtype is dtype
            and x.is_cpu
            and not x.is_neg()
            and x.untyped_storage().nbytes() >= size * (x.storage_offset() + span)
            and ((address := x.data_ptr()) or not span)
        ):
            return int(address)
    except RuntimeError:  # what has no sizes or no storage
        pass
    operand("a moving tensor", x, dtype, *shape)  # which says why, or finds it different but right
    if x.stride() != stride:
        raise ValueError(f"a moving tensor must have strides {list(stride)}, as recorded.")
    return int(x.data_ptr())


def _slot(letter: str, value: Any) -> int:
    """Return an argument as the 64 bits that a record holds."""
    if letter == "f":
        return int(struct.unpack("q", struct.pack("f4x", value))[0])
    return 0 if value is None else int(value)
