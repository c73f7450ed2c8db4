"""The CPU with an op that fails on rank `-O rank=...` as `-O fault=...` says, after `-O call=...` calls.

scale: what it writes is 5 % too large. raises: it raises. hangs: the process stops. waits: for ever.
With `-O choice=rank` rank 0 would choose a right op, and the others the wrong one; they have one more.
With `-O library=none` it has no collectives. The variable RANK_THREADS sets its threads.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from wrapped_op import OneThread, WrappedOp

from mla_backends import FusedOp


class Faulty(WrappedOp):
    """The reference op, and then its fault."""

    woken = False  # in this process, which may have several of it

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__("linear")
        self._fault = options.get("fault") if os.environ["RANK"] == options.get("rank", "1") else None
        self._left = int(options.get("call", "0"))

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        super().__call__(*leading, **tensors)
        self._left -= 1
        if self._fault is None or self._left >= 0:
            return
        if self._fault == "hangs":
            if not Faulty.woken:  # once it goes on, it does
                Faulty.woken = True
                os.kill(os.getpid(), signal.SIGSTOP)
            return
        if self._fault == "waits":
            time.sleep(3600)
        elif self._fault == "scale":
            tensors["out"] *= 1.05
        elif self._fault == "raises":
            raise RuntimeError("the card fell off the bus")


class FaultyRank(OneThread):
    name = "faulty-rank"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "fault", "rank", "call", "library", "choice")

    def setup(self, index: int | None = None) -> torch.device:
        device = super().setup(index)
        torch.set_num_threads(int(os.environ.get("RANK_THREADS", "1")))
        return device

    def collectives(self) -> str | None:
        return None if self.options.get("library") == "none" else "gloo"

    def ops(self) -> Mapping[str, FusedOp]:
        ops: dict[str, FusedOp] = {"faulty_linear": Faulty(self.options)}
        if "choice" not in self.options:
            return ops
        right = {"right_linear": Faulty({})}
        return right | ops if os.environ["RANK"] == "0" else {**ops, "other_linear": Faulty({})} | right
