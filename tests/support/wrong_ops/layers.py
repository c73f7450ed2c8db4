"""Ops that make a layer wrong in one way each, as some checks see only through a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from wrong_attention.base import altered, curried

from mla.reference import REFERENCE
from mla_backends.api import Packed
from wrong_ops import formulas
from wrong_ops.base import changing, mutant

Linear: Any = type(REFERENCE["linear"])
Prepare = Callable[[Any, Any], Any]


# -------------------------------------------------------------------------------- products, rotation


class Lossy(Linear):  # type: ignore[misc]
    """Gives back weights that have been through half precision."""

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data.half().to(packed.data.dtype)


def no_bias() -> Any:
    return changing("linear", "bias", lambda bias: None)


def on_the_host() -> Any:
    """Reads its input on the host, which a replay does not do again."""
    return changing("linear", "x", lambda x: torch.from_numpy(x.numpy().copy()))


def scratch_of_nothing() -> Any:
    """Makes scratch memory for as many rows as its first call of a weight had, or the last empty one."""
    rows: dict[int, int] = {}

    def body(right: Any, packed: Packed, *, x: Any, out: Any, **given: Any) -> None:
        right(packed, x=x, out=out, **given)
        out[rows.get(id(packed), len(x)) :] = 0
        if not len(x):
            rows[id(packed)] = 0

    return mutant("linear", body)


def always_interleaved() -> Any:
    return changing("rotate_query", "interleaved", lambda interleaved: True)


# -------------------------------------------------------------------------------- writes


def unrotated() -> Any:
    """Caches the new key as it was projected."""
    return changing("write_latent", "cos_sin", formulas.unrotated)


def unnormed() -> Any:
    """Caches the latent without its norm's weight."""
    return changing("write_latent", "weight", torch.ones_like)


def two_slots() -> Any:
    """Writes every row to its slot and to one that nobody owns."""

    def body(right: Any, **given: Any) -> None:
        right(**given)
        rows = given["cache"].view(-1, given["cache"].shape[-1])
        free = rows.isnan().all(-1)
        last = free & (free.flip(0).cumsum(0).flip(0) == 1)
        rows.masked_fill_(last[:, None], 0)

    return mutant("write_latent", body)


def accumulating() -> Any:
    """Adds to what the slot holds, as an atomic scatter does, unless that is poison."""

    def body(right: Any, **given: Any) -> None:
        rows, slots = given["cache"].view(-1, given["cache"].shape[-1]), given["slots"]
        before = rows[slots].clone()
        right(**given)
        clean = (before.abs() < 1e3) & before.isfinite()
        rows[slots] += torch.where(clean, before, 0)

    return mutant("write_latent", body)


def first_slot_if_empty() -> Any:
    """Launches at least one block, which writes a row."""

    def body(right: Any, **given: Any) -> None:
        right(**given)
        if not len(given["kv_a"]):
            given["cache"][0, 0] = 0

    return mutant("write_latent", body)


OF_ROWS = ("k", "cos_sin", "slots")


def key_of_the_step_before() -> Any:
    """Writes index keys when the next ones come."""
    waiting: list[dict[str, Any]] = []

    def body(right: Any, **given: Any) -> None:
        for earlier in waiting:
            right(**earlier)
        waiting[:] = [{**given, **{name: given[name].clone() for name in OF_ROWS}}]

    return mutant("write_index_key", body)


def keys_of_new_pages() -> Any:
    """Writes the first slot of a page, and loses the rest."""

    def body(right: Any, **given: Any) -> None:
        first = given["slots"] % given["cache"].shape[1] == 0
        right(**{**given, **{name: given[name][first] for name in OF_ROWS}})

    return mutant("write_index_key", body)


# -------------------------------------------------------------------------------- plans


def of_the_object() -> Prepare:
    """Remembers the lengths of a batch for as long as the object lives."""
    plans: dict[int, Any] = {}
    return lambda spec, batch: plans.setdefault(id(batch), (batch, altered(batch)))[1]


def last_page_dropped(spec: Any, batch: Any) -> Any:
    """Decode misses the last page until it is full."""
    size, pairs = batch.page_size, zip(batch.query_lens, batch.kv_lens, strict=True)
    lens = tuple(kv - kv % size if new == 1 and kv > size else kv for new, kv in pairs)
    return altered(batch, kv_lens=lens)


def consecutive_pages(spec: Any, batch: Any) -> Any:
    """The pages of a request are taken to follow its first one."""
    table = batch.block_table
    follow = (table[:, :1] + torch.arange(table.shape[1])).int() % (int(table.max()) + 1)
    return altered(batch, block_table=follow)


def early_keys(spec: Any, batch: Any) -> Any:
    """New tokens see their own number of keys only: history counts, but its length does not."""
    pairs = zip(batch.query_lens, batch.kv_lens, strict=True)
    return altered(batch, kv_lens=tuple(new if 1 < new < kv else kv for new, kv in pairs))


# -------------------------------------------------------------------------------- outputs


def moved_if_mixed(batch: Any, *, out: Any, **tensors: Any) -> None:
    """Rows move by one where requests have different numbers of new tokens."""
    if len(set(batch.query_lens)) > 2:
        out.copy_(out.roll(1, 0))


@curried
def ties(reverse: bool, batch: Any, *, out: Any, **tensors: Any) -> None:
    """Equal requests come back in another order: reversed, or each in the place of the one before."""
    rows = list(range(sum(batch.query_lens)))
    requests = torch.tensor(rows).split(list(batch.query_lens))
    equal: dict[tuple[int, int], list[int]] = {}
    for request, lengths in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        equal.setdefault(lengths, []).append(request)
    for members in equal.values():
        moved = members[::-1] if reverse else members[-1:] + members[:-1]
        for place, request in zip(members, moved, strict=True):
            for row, of in zip(requests[place].tolist(), requests[request].tolist(), strict=True):
                rows[row] = of
    out.copy_(out[rows])
