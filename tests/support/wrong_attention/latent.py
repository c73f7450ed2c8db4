"""Wrong `latent_attention`, one fault per check at least."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from wrong_attention.base import FAR, PAGE, Latent, Makers, after, altered, curried, given, wrong
from wrong_attention.both import (
    as_contiguous,
    base_two,
    empty_unwritten,
    first_layers,
    made_for,
    many_heads,
    no_maximum,
    nothing,
    plus_infinity,
    rows_moved,
    scaled_in_place,
    usual_scale,
    waits,
    without_lse,
)


def neighbours_table(spec: Any, batch: Any) -> Any:
    return altered(batch, block_table=batch.block_table.roll(1, 0)[:, : batch.block_table.shape[1]])


def full_page_dropped(spec: Any, batch: Any) -> Any:
    lens = [kv - PAGE if kv % PAGE == 0 and kv > PAGE else kv for kv in batch.kv_lens]
    lens = [max(kv, q) for kv, q in zip(lens, batch.query_lens, strict=True)]
    return altered(batch, kv_lens=tuple(lens))


def last_window(spec: Any, batch: Any) -> Any:
    """Drop all but the last 2048 tokens, as a merge does that keeps the last part only."""
    skip = [max(0, kv - 2048) // PAGE for kv in batch.kv_lens]
    width = batch.block_table.shape[1]
    rows = [row.roll(-pages)[:width] for row, pages in zip(batch.block_table, skip, strict=True)]
    lens = tuple(kv - PAGE * pages for kv, pages in zip(batch.kv_lens, skip, strict=True))
    return altered(batch, block_table=torch.stack(rows), kv_lens=lens)


class LeakingMask(Latent):  # type: ignore[misc, valid-type]
    """Every masked query sees one key more, or one key fewer."""

    by = 1

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(spec, batch)
        return tuple(g if g.hidden is None else g._replace(hidden=self.moved(g.hidden)) for g in state)

    def moved(self, hidden: torch.Tensor) -> torch.Tensor:
        moved = hidden.roll(self.by, dims=-1)
        moved[..., 0 if self.by > 0 else -1] = self.by < 0
        return moved


class ShortMask(LeakingMask):
    by = -1


def fixed_page(right: Any, batch: Any, *, cache: Any, **tensors: Any) -> None:
    """Read a cache of other pages as if they held 64 tokens."""
    right(cache=cache if cache.shape[1] == PAGE else cache.roll(1, 1), **tensors)


def times_zero(batch: Any, *, out: Any, cache: Any, block_table: Any, **tensors: Any) -> None:
    out.add_(0 * cache[block_table.flatten().long()].float().sum())


def tail_leak(batch: Any, *, out: Any, cache: Any, block_table: Any, **tensors: Any) -> None:
    for request, length in enumerate(batch.kv_lens):
        page, used = divmod(length, cache.shape[1])
        if used:
            out.add_(1e-6 * cache[block_table[request, page].long(), used:].float().mean())


def zero_becomes_one(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    """A request without new tokens takes a row, and what follows is one row late."""
    for request, length in enumerate(batch.query_lens):
        if length == 0 and sum(batch.query_lens[:request]) < len(out):
            out[sum(batch.query_lens[:request]) :] = out[sum(batch.query_lens[:request]) :].roll(1, 0)


@curried
def lse_of_few_keys(most: int, by: float, batch: Any, *, lse: Any, **tensors: Any) -> None:
    """Move the log-sum-exp of requests with so few keys, but some."""
    first = 0
    for count, length in zip(batch.query_lens, batch.kv_lens, strict=True):
        if 0 < length <= most:
            lse[first : first + count] += by
        first += count


def first_lengths() -> Callable[..., Any]:
    """Return a plan that is remembered for the shape of the batch."""
    plans: dict[Any, Any] = {}
    return lambda spec, batch: plans.setdefault(
        (len(batch.kv_lens), batch.query_lens, batch.page_size), batch
    )


@curried
def last_key_lost(
    rows: int,
    keys: int,
    batch: Any,
    *,
    q: Any,
    cache: Any,
    block_table: Any,
    softmax_scale: float,
    out: Any,
    **tensors: Any,
) -> None:
    """Round the keys that a tile of rows sees down to whole tokens, where the token's own starts a tile."""
    first, heads = 0, q.shape[1]
    for table, count, length in zip(block_table, batch.query_lens, batch.kv_lens, strict=True):
        for end in range(rows, count * heads, rows):
            token, cut = divmod(end, heads)
            visible = length - count + token
            if cut and visible > 0 and visible % keys == 0:
                latents = cache[table.long()].flatten(0, 1)[:visible].float()
                logits = q[first + token, :cut].float() @ latents.T * softmax_scale
                out[first + token, :cut] = (logits.softmax(-1) @ latents[:, : out.shape[2]]).to(out.dtype)
        first += count


@curried
def wrapped(numbers: int, spec: Any, batch: Any) -> Any:
    """Find pages where so many numbers wrap around."""
    page = batch.page_size * (spec.kv_lora_rank + spec.qk_rope_head_dim)
    return altered(batch, block_table=(batch.block_table.long() * page % numbers // page).int())


def host_query(right: Any, batch: Any, *, q: Any, **tensors: Any) -> None:
    right(q=torch.from_numpy(q.numpy().copy()), **tensors)


class FrozenLengths(Latent):  # type: ignore[misc, valid-type]
    """Says that it follows its batch, and has its lengths on the host."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        return SimpleNamespace(inner=super().prepare(spec, batch), graph_safe=True)

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state.inner, **tensors)


MUTANTS: Makers = {
    "latent.decode": [lambda: wrong(Latent, prepare=neighbours_table)],
    "latent.page_boundaries": [lambda: wrong(Latent, prepare=full_page_dropped)],
    "latent.page_sizes": [lambda: wrong(Latent, fixed_page)],
    "latent.poison": [lambda: after(Latent, times_zero)],
    "latent.tail": [lambda: after(Latent, tail_leak), lambda: after(Latent, tail_leak, nan_safe_tail=False)],
    "latent.multi_token": [LeakingMask, ShortMask],
    "latent.prefill": [LeakingMask, ShortMask],
    "latent.mixed": [lambda: after(Latent, rows_moved)],
    "latent.zero_queries": [lambda: after(Latent, zero_becomes_one)],
    "latent.empty_rows": [lambda: after(Latent, plus_infinity), lambda: after(Latent, empty_unwritten)],
    "latent.heads": [lambda: after(Latent, many_heads)],
    "latent.lse": [lambda: after(Latent, base_two)],
    "latent.shares": [
        lambda: after(Latent, base_two),
        lambda: after(Latent, plus_infinity),
        *(lambda r=r: after(Latent, lse_of_few_keys(*r)) for r in ((1, 1.0), (64, -0.2))),
    ],
    "latent.scale": [lambda: given(Latent, usual_scale(192)), lambda: given(Latent, usual_scale(576))],
    "latent.large": [lambda: after(Latent, no_maximum)],
    "latent.long": [lambda: wrong(Latent, prepare=last_window)],
    "latent.strided": [lambda: given(Latent, as_contiguous("q"))],
    "latent.inputs": [lambda: wrong(Latent, scaled_in_place)],
    "latent.reuse": [lambda: wrong(Latent, first_layers("cache"))],
    "latent.prepare": [lambda: wrong(Latent, prepare=waits)],
    "latent.other_widths": [lambda: after(Latent, made_for(512))],
    "latent.stepping": [lambda: wrong(Latent, prepare=first_lengths())],
    "latent.without_lse": [lambda: without_lse(Latent), lambda: without_lse(Latent, nothing)],
    "latent.cut_tokens": [
        lambda: after(Latent, last_key_lost(128, 64)),
        lambda: after(Latent, last_key_lost(64, 16)),
    ],
    "latent.far_pages": [
        lambda: wrong(Latent, prepare=wrapped(FAR)),
        lambda: wrong(Latent, prepare=wrapped(FAR // 2)),
    ],
    "latent.graph": [lambda: wrong(Latent, host_query)],
    "latent.graph_lengths": [FrozenLengths],
}
