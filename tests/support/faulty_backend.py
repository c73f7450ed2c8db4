"""The CPU with one op of a kind, `-O op=...`, that is the reference but for the fault in `-O fault=...`.

none: it is right. scale: what it writes is 5 % too large, and an integer by 1. head: so is the last head, or
column, alone. lse: its log-sum-exp is 0.1 too large. no_lse: it writes none and says so. half: it leaves the
last row as it was. stray: it writes one more slot of a cache. stops: from its second call it does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from wrapped_op import OneThread, WrappedOp

from mla_backends import FusedOp


class FaultyOp(WrappedOp):
    """A reference op, and then its fault."""

    def __init__(self, kind: str, fault: str) -> None:
        super().__init__(kind)
        self._fault = fault
        self.writes_lse = fault != "no_lse"
        self._calls = 0

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        self._calls += 1
        if self._fault == "stops" and self._calls > 1:
            return
        flat = "slots" in tensors
        out = tensors["cache"].view(-1, tensors["cache"].shape[-1]) if flat else tensors["out"]
        if not len(tensors["slots"] if flat else out):  # there is nothing to spoil
            self.right(*leading, **tensors)
            return
        rows: Any = tensors["slots"] if flat else slice(None)
        last = rows[-1] if flat else -1
        before = out[last].clone()
        self.right(*leading, **tensors)
        if self._fault == "scale" and not out.is_floating_point():
            out[rows] += 1
        elif self._fault == "scale":
            out[rows] *= 1.05
        elif self._fault == "head":
            out[rows, -1] *= 1.05
        elif self._fault == "half":
            out[last] = before
        elif self._fault == "lse":
            tensors["lse"] += 0.1
        elif self._fault == "no_lse":
            tensors["lse"].fill_(torch.nan)
        elif self._fault == "stray":
            out[next(slot for slot in range(len(out)) if slot not in rows)] = 0


class FaultyBackend(OneThread):
    name = "faulty"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "op", "fault")

    def dtypes(self) -> Sequence[torch.dtype]:
        return (torch.bfloat16, torch.float16, torch.float32)

    def ops(self) -> Mapping[str, FusedOp]:
        return {"faulty": FaultyOp(self.options["op"], self.options.get("fault", "none"))}
