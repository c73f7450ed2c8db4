"""An address sanitizer: what a launch touches must belong to one of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from interpreting.faults import OutOfBounds, place


class Owned:
    """The memory that a launch may touch: the storages of its arguments."""

    def __init__(self, tensors: Sequence[torch.Tensor] = ()) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        spans = sorted({(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages})
        self._starts, self._ends = np.array([(0, 0), *spans], np.uint64).T

    def strange(self, addresses: np.ndarray, width: int) -> int:
        """Return how many accesses of `width` bytes are not inside one storage."""
        if not addresses.size:
            return 0
        low, high = addresses.min(), addresses.max()
        at = int(np.searchsorted(self._starts, low, side="right")) - 1
        if high + np.uint64(width) <= self._ends[at]:
            return 0
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        return int((addresses + np.uint64(width) > self._ends[at]).sum())


class Addresses(InterpreterBuilder):  # type: ignore[misc]
    """Loads, stores and atomics."""

    owned = Owned()
    grid_idx: tuple[int, int, int]

    def create_masked_load(self, ptrs: TensorHandle, mask: TensorHandle, *rest: Any, **named: Any) -> Any:
        self._require_owned("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *rest, **named)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any, **named: Any
    ) -> Any:
        self._require_owned("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *rest, **named)

    def create_atomic_rmw(
        self, rmwOp: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *rest: Any
    ) -> Any:
        self._require_owned("atomic", ptr, mask)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr: TensorHandle, *rest: Any) -> Any:
        self._require_owned("atomic", ptr, None)
        return super().create_atomic_cas(ptr, *rest)

    def _require_owned(self, what: str, ptrs: TensorHandle, mask: TensorHandle | None) -> None:
        addresses = ptrs.data
        if mask is not None and not mask.data.all():
            addresses = np.broadcast_to(addresses, mask.data.shape)[mask.data]
        width = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        strange = self.owned.strange(addresses, width)
        if strange:
            raise OutOfBounds(
                f"{what} of {strange} of {addresses.size} addresses outside every argument ({place()})"
            )
