"""Ops that make a layer wrong in one way each, as some checks see only through a layer."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from mla.reference import REFERENCE
from mla_backends.api import Packed

Linear, Rotate, Write, Latent, Expanded, WriteKey, Select = (
    type(REFERENCE[kind])
    for kind in (
        *("linear", "rotate_query", "write_latent", "latent_attention", "expanded_attention"),
        *("write_index_key", "select_latents"),
    )
)


class Lossy(Linear):  # type: ignore[misc, valid-type]
    """Gives back weights that have been through half precision."""

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data.half().to(packed.data.dtype)


class NoBias(Linear):  # type: ignore[misc, valid-type]
    def __call__(self, packed: Packed, *, x: Any, bias: Any, out: Any) -> None:
        super().__call__(packed, x=x, bias=None, out=out)


class AlwaysInterleaved(Rotate):  # type: ignore[misc, valid-type]
    def __call__(self, **tensors: Any) -> None:
        super().__call__(**{**tensors, "interleaved": True})


class Unrotated(Write):  # type: ignore[misc, valid-type]
    """Caches the new key as it was projected."""

    def __call__(self, **tensors: Any) -> None:
        still = torch.zeros_like(tensors["cos_sin"])
        still[:, : still.shape[1] // 2] = 1
        super().__call__(**{**tensors, "cos_sin": still})


class Unnormed(Write):  # type: ignore[misc, valid-type]
    """Caches the latent without its norm's weight."""

    def __call__(self, **tensors: Any) -> None:
        super().__call__(**{**tensors, "weight": torch.ones_like(tensors["weight"])})


class TwoSlots(Write):  # type: ignore[misc, valid-type]
    """Writes every row to its slot and to one that nobody owns."""

    def __call__(self, **tensors: Any) -> None:
        super().__call__(**tensors)
        rows = tensors["cache"].view(-1, tensors["cache"].shape[-1])
        free = rows.isnan().all(-1)
        last = free & (free.flip(0).cumsum(0).flip(0) == 1)
        rows.masked_fill_(last[:, None], 0)


class Accumulating(Write):  # type: ignore[misc, valid-type]
    """Adds to what the slot holds, as an atomic scatter does, unless that is poison."""

    def __call__(self, **tensors: Any) -> None:
        rows, slots = tensors["cache"].view(-1, tensors["cache"].shape[-1]), tensors["slots"]
        before = rows[slots].clone()
        super().__call__(**tensors)
        clean = (before.abs() < 1e3) & before.isfinite()
        rows[slots] += torch.where(clean, before, 0)


class KeyOfTheStepBefore(WriteKey):  # type: ignore[misc, valid-type]
    """Writes index keys when the next ones come."""

    def __init__(self) -> None:
        self._waiting: dict[str, Any] | None = None

    def __call__(self, **tensors: Any) -> None:
        if self._waiting is not None:
            super().__call__(**self._waiting)
        copied = {name: tensors[name].clone() for name in ("k", "cos_sin", "slots")}
        self._waiting = {**tensors, **copied}


class KeysOfNewPages(WriteKey):  # type: ignore[misc, valid-type]
    """Writes the first slot of a page, and loses the rest."""

    def __call__(self, **tensors: Any) -> None:
        first = tensors["slots"] % tensors["cache"].shape[1] == 0
        super().__call__(**{**tensors, **{name: tensors[name][first] for name in ("k", "cos_sin", "slots")}})


class SelectsForTheObject(Select):  # type: ignore[misc, valid-type]
    """Remembers the lengths of a batch for as long as the object lives."""

    def __init__(self) -> None:
        self._plans: dict[int, Any] = {}

    def prepare(self, spec: Any, batch: Any) -> Any:
        return self._plans.setdefault(id(batch), (batch, changed(batch)))[1]


class LastPageDropped(Latent):  # type: ignore[misc, valid-type]
    """Decode misses the last page until it is full."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        size = batch.page_size
        pairs = zip(batch.query_lens, batch.kv_lens, strict=True)
        lens = tuple(kv - kv % size if q == 1 and kv > size else kv for q, kv in pairs)
        return super().prepare(spec, changed(batch, kv_lens=lens))


class ConsecutivePages(Latent):  # type: ignore[misc, valid-type]
    """Takes the pages of a request to follow its first one."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        table = batch.block_table
        follow = (table[:, :1] + torch.arange(table.shape[1])).int() % (int(table.max()) + 1)
        return super().prepare(spec, changed(batch, block_table=follow))


class FutureLeak(Expanded):  # type: ignore[misc, valid-type]
    def prepare(self, spec: Any, lengths: Any) -> Any:
        return SimpleNamespace(query_lens=lengths.query_lens, kv_lens=lengths.kv_lens, causal=False)


class EarlyKeys(Latent):  # type: ignore[misc, valid-type]
    """New tokens see their own number of keys only: history counts, but its length does not."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        pairs = zip(batch.query_lens, batch.kv_lens, strict=True)
        lens = tuple(q if 1 < q < kv else kv for q, kv in pairs)
        return super().prepare(spec, changed(batch, kv_lens=lens))


class RowsMoved(Latent):  # type: ignore[misc, valid-type]
    """Rows move by one where requests have different numbers of new tokens."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        return super().prepare(spec, batch), len(set(batch.query_lens)) > 2

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state[0], **tensors)
        if state[1]:
            tensors["out"].copy_(tensors["out"].roll(1, 0))


class BaseTwo(Expanded):  # type: ignore[misc, valid-type]
    """A log-sum-exp to base 2: nobody looks, until two parts of a context are merged."""

    lse_optional = False

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state, **tensors)
        tensors["lse"].div_(math.log(2))


class FirstCache(Latent):  # type: ignore[misc, valid-type]
    """Reads the cache of the first layer that used the plan."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        return super().prepare(spec, batch), []

    def __call__(self, state: Any, **tensors: Any) -> None:
        inner, seen = state
        seen.append(tensors["cache"])
        super().__call__(inner, **{**tensors, "cache": seen[0]})


class PlanOfTheObject(Latent):  # type: ignore[misc, valid-type]
    """Remembers the plan of a batch for as long as the object lives."""

    def __init__(self) -> None:
        self._plans: dict[int, Any] = {}

    def prepare(self, spec: Any, batch: Any) -> Any:
        if id(batch) not in self._plans:
            self._plans[id(batch)] = (batch, super().prepare(spec, batch))
        return self._plans[id(batch)][1]


class OnTheHost(Linear):  # type: ignore[misc, valid-type]
    """Reads its input on the host, which a replay does not do again."""

    def __call__(self, packed: Packed, *, x: Any, bias: Any, out: Any) -> None:
        super().__call__(packed, x=torch.from_numpy(x.numpy().copy()), bias=bias, out=out)


class FrozenLengths(Latent):  # type: ignore[misc, valid-type]
    """Says that a captured call follows its batch, and has its lengths on the host."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        return SimpleNamespace(inner=super().prepare(spec, batch), graph_safe=True)

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state.inner, **tensors)


class Ties(Latent):  # type: ignore[misc, valid-type]
    """Sorts requests by their lengths and puts equal ones back in another order."""

    reverse = True  # the order of all equal ones; else each takes the place of the one before

    def prepare(self, spec: Any, batch: Any) -> Any:
        rows = list(range(sum(batch.query_lens)))
        requests = torch.tensor(rows).split(list(batch.query_lens))
        equal: dict[tuple[int, int], list[int]] = {}
        for request, lengths in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
            equal.setdefault(lengths, []).append(request)
        for members in equal.values():
            moved = members[::-1] if self.reverse else members[-1:] + members[:-1]
            for place, request in zip(members, moved, strict=True):
                for row, of in zip(requests[place].tolist(), requests[request].tolist(), strict=True):
                    rows[row] = of
        return super().prepare(spec, batch), rows

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state[0], **tensors)
        tensors["out"].copy_(tensors["out"][state[1]])


class ShiftedTies(Ties):
    reverse = False


class FewRequests(Latent):  # type: ignore[misc, valid-type]
    """Attends so many requests of a batch."""

    most = 128

    def prepare(self, spec: Any, batch: Any) -> Any:
        return super().prepare(spec, batch), sum(batch.query_lens[: self.most])

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state[0], **tensors)
        tensors["out"][state[1] :] = 0


class FewerRequests(FewRequests):
    most = 8


class FirstSlotIfEmpty(Write):  # type: ignore[misc, valid-type]
    """Launches at least one block, which writes a row."""

    def __call__(self, **tensors: Any) -> None:
        super().__call__(**tensors)
        if not len(tensors["kv_a"]):
            tensors["cache"][0, 0] = 0


class ScratchOfNothing(Linear):  # type: ignore[misc, valid-type]
    """Makes scratch memory for as many rows as its first call of a weight had, or the last empty one."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def __call__(self, packed: Packed, *, x: Any, bias: Any, out: Any) -> None:
        super().__call__(packed, x=x, bias=bias, out=out)
        out[self._rows.get(id(packed), len(x)) :] = 0
        if not len(x):
            self._rows[id(packed)] = 0


def changed(batch: Any, **changes: Any) -> SimpleNamespace:
    names = ("query_lens", "kv_lens", "page_size", "block_table", "kv_lens_device", "cu_q")
    return SimpleNamespace(**{**{name: getattr(batch, name) for name in names}, **changes})
