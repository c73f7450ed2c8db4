"""A backend that makes repeated forwards in one call, by keeping the calls of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from mla.reference import REFERENCE
from mla_backends import FusedOp
from mla_backends.api import OPS, OpCall
from mla_backends.testing import HostBackend

Reference = type(REFERENCE["latent_attention"])


class Stateless(FusedOp):
    """Latent attention that reads all it needs from its tensors, as a kernel does."""

    contract = OPS["latent_attention"]

    def __init__(self) -> None:
        self._spec: Any = None

    def unsupported_reasons(self, spec: Any) -> list[str]:
        self._spec = spec
        return []

    def __call__(self, state: None, **tensors: Any) -> None:
        batch = SimpleNamespace(
            query_lens=tuple(tensors["cu_q"].diff().tolist()),
            kv_lens=tuple(tensors["kv_lens"].tolist()),
            page_size=tensors["cache"].shape[1],
            block_table=tensors["block_table"],
            device=torch.device("cpu"),
        )
        op = Reference()
        op(op.prepare(self._spec, batch), **tensors)


class Sequencing(HostBackend):
    """The CPU, which makes sequences by keeping the calls, and counts."""

    name = "sequencing"

    def __init__(self, *, refuses: bool = False, stateless: bool = True) -> None:
        super().__init__(ops={"stateless": Stateless()} if stateless else {})
        self.refuses, self.stateless = refuses, stateless
        self.asked = self.ran = 0

    def sequence(self, calls: Sequence[OpCall], moving: Sequence[torch.Tensor]) -> Callable[..., None] | None:
        self.asked += 1
        return None if self.refuses else lambda *moved: self._run(calls, moving, moved)

    def _run(
        self, calls: Sequence[OpCall], moving: Sequence[torch.Tensor], moved: Sequence[torch.Tensor]
    ) -> None:
        self.ran += 1
        for old, new in zip(moving, moved, strict=True):
            assert (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
        for call in calls:
            tensors = dict(call.tensors)
            for name, tensor in tensors.items():
                for old, new in zip(moving, moved, strict=True):
                    tensors[name] = new if tensor is old else tensors[name]
            call.op(*call.arguments, **tensors)
