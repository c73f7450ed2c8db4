"""Backends for runs over several ranks whose ops cost a case, and not the run.

`Refusing`: on ranks `-O rank=1+2`, or on "all", the op fails as `-O what=...` says: refuse, or memory, where
memory is short. `-O at=...`: in `pack`, for the first `-O times=...` calls; in `prepare`, or when it is
called, for batches of more than one new token per request. Rank `-O count=...` writes into loaded.txt how
many layers are loaded whenever another one packs a weight.

`Noting`: honest; each rank writes into lengths0.txt, ... the lengths of every batch that it plans. With
`-O picky=yes`, it refuses one in four numbers of keys of a last request that has three new tokens.

`Remembering`: a cheat; after `-O idle=...` forwards it answers inputs that it does not know from others.

`Reading`: rank 1 writes into read.txt how many numbers it reads from checkpoints, for which it replaces a
function of ours.
"""

from __future__ import annotations

import functools
import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from opponents.memory import RemembersForwards
from wrapped_op import OneThread, WrappedOp

from mla.bench.ranks.layers import RankLayer
from mla.checkpoint.folder import StoredTensor
from mla_backends import BackendError, FusedOp
from mla_backends.api import Packed


class FailingAttention(WrappedOp):
    """Attention of the reference that fails before a prefill, or in it."""

    def __init__(self, fail: Any) -> None:
        super().__init__("latent_attention")
        self._fail = fail

    def prepare(self, spec: Any, batch: Any) -> Any:
        several = max(batch.query_lens) > 1
        if several:
            self._fail("prepare")
        return several, super().prepare(spec, batch)

    def __call__(self, state: Any, *leading: Any, **tensors: Any) -> None:
        several, of_rank = state
        if several:
            self._fail("call")
        super().__call__(of_rank, *leading, **tensors)


class FailingLinear(WrappedOp):
    """A product of the reference whose weights cannot always be packed."""

    def __init__(self, fail: Any) -> None:
        super().__init__("linear")
        self._fail = fail

    def pack(self, weight: torch.Tensor) -> Packed:
        self._fail("pack")
        return super().pack(weight)


class _OnRanks(OneThread):
    """The CPU on one thread, with gloo."""

    def collectives(self) -> str | None:
        return "gloo"


class Refusing(_OnRanks):
    name = "refusing"

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self._left = int(self.options.get("times", "1000000"))

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "rank", "what", "at", "times", "count")

    def fail(self, at: str) -> None:
        """Fail, if that is asked for here."""
        if at == "pack" and self.options.get("count") == os.environ["RANK"]:
            layers = (layer for layer in gc.get_objects() if type(layer) is RankLayer)
            with Path("loaded.txt").open("a") as stream:
                stream.write(f"{sum(hasattr(layer, '_cache') for layer in layers)}\n")
        named = self.options.get("rank", "").split("+")
        mine = "all" in named or os.environ["RANK"] in named
        if not mine or self.options.get("at") != at or self._left <= 0:
            return
        self._left -= 1
        if self.options["what"] == "refuse":
            raise BackendError("the card has no room for such a tile.")
        raise MemoryError("no memory for a tile")

    def ops(self) -> Mapping[str, FusedOp]:
        return {"attention": FailingAttention(self.fail), "linear": FailingLinear(self.fail)}


class NotingAttention(FailingAttention):
    """Attention of the reference that notes what it plans."""

    def __init__(self, picky: bool) -> None:
        super().__init__(lambda at: None)
        self._picky = picky

    def prepare(self, spec: Any, batch: Any) -> Any:
        if self._picky and batch.query_lens[-1] == 3 and batch.kv_lens[-1] % 4 == 1:
            raise BackendError("no tile has that many keys.")
        with Path(f"lengths{os.environ['RANK']}.txt").open("a") as stream:
            stream.write(f"{json.dumps([list(batch.query_lens), list(batch.kv_lens)])}\n")
        return super().prepare(spec, batch)


class Noting(_OnRanks):
    name = "noting"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "picky")

    def ops(self) -> Mapping[str, FusedOp]:
        return {"attention": NotingAttention("picky" in self.options)}


class Remembering(RemembersForwards, _OnRanks):
    name = "remembering"

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options=options, idle=int((options or {}).get("idle", "0")))

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "idle")


class Reading(_OnRanks):
    name = "reading"

    def setup(self, index: int | None = None) -> torch.device:
        if os.environ["RANK"] == "1" and not hasattr(StoredTensor.rows, "__wrapped__"):
            _count(Path("read.txt"))
        return super().setup(index)


def _count(file: Path) -> None:
    rows = StoredTensor.rows

    @functools.wraps(rows)
    def counted(self: StoredTensor, *arguments: Any, **more: Any) -> torch.Tensor:
        part = rows(self, *arguments, **more)
        with file.open("a") as stream:
            stream.write(f"{part.numel()}\n")
        return part

    StoredTensor.rows = counted  # type: ignore[method-assign]
