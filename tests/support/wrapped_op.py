"""The reference of a kind of op, around which a subclass does something, and the CPU on one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mla.reference import REFERENCE
from mla_backends import FusedOp
from mla_backends.api import Packed
from mla_backends.testing import HostBackend


class OneThread(HostBackend):
    """The CPU on one thread."""

    def setup(self, index: int | None = None) -> torch.device:
        torch.set_num_threads(1)
        return super().setup(index)

    def dtypes(self) -> Sequence[torch.dtype]:
        return (torch.bfloat16, torch.float32)


class WrappedOp(FusedOp):
    """The reference of `kind`."""

    nan_safe_tail = True

    def __init__(self, kind: str) -> None:
        self.right = REFERENCE[kind]
        self.contract = self.right.contract

    def pack(self, weight: torch.Tensor) -> Packed:
        return self.right.pack(weight)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return self.right.unpack(packed)

    def prepare(self, spec: Any, batch: Any) -> Any:
        return self.right.prepare(spec, batch)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        self.right(*leading, **tensors)
