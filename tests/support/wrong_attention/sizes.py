"""Attention that is wrong beyond a size: of a grid, an index, a tile or a context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wrong_attention.base import FAR, Expanded, Latent, Makers, after, altered, curried, starts, wrong

Spoil = Callable[..., None]


# ------------------------------------------------------------------------------------------------- grids


@curried
def requests_from(limit: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    """Leave out every request from the limit on."""
    out[starts(batch)[min(limit, len(batch.query_lens))] :] = 0


@curried
def crowd(limit: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    """Spoil all rows of a batch of more requests."""
    if len(batch.query_lens) > limit:
        out.mul_(1.1)


@curried
def tokens_from(limit: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    out[limit:] = 0


@curried
def rows_from(limit: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    """A row is one head of one token."""
    token, head = divmod(limit, out.shape[1])
    out[token : token + 1, head:] = 0
    out[token + 1 :] = 0


# ----------------------------------------------------------------------------------------------- indices


def pages_modulo(pages: int) -> Callable[..., Any]:
    return lambda spec, batch: altered(batch, block_table=batch.block_table % pages)


@curried
def slots_modulo(slots: int, spec: Any, batch: Any) -> Any:
    return altered(batch, block_table=batch.block_table % max(1, slots // batch.page_size))


@curried
def null_page(page: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    """A page that stands for none: whoever owns it gets 0."""
    for request, (first, new) in enumerate(zip(starts(batch), batch.query_lens, strict=False)):
        owned = batch.block_table[request, : -(-batch.kv_lens[request] // batch.page_size)]
        if bool((owned == page).any()):
            out[first : first + new] = 0


@curried
def entries_modulo(entries: int, spec: Any, batch: Any) -> Any:
    """The place of an entry in the flattened block table wraps."""
    table = batch.block_table
    place = torch.arange(table.numel()) % entries
    return altered(batch, block_table=table.reshape(-1)[place].view(table.shape))


@curried
def rows_modulo(limit: int, right: Any, batch: Any, *, k: Any, v: Any, **tensors: Any) -> None:
    """The place of a key's row wraps."""
    place = torch.arange(len(k)) % limit
    right(k=k[place], v=v[place], **tensors)


@curried
def places_modulo(name: str, numbers: int, right: Any, batch: Any, **tensors: Any) -> None:
    """The place of a row in memory wraps."""
    rows = tensors[name]
    step = rows.stride(0)
    wrapped = [rows[(row * step % numbers) // step] for row in range(len(rows))]
    right(**{**tensors, name: torch.stack(wrapped)})


# ------------------------------------------------------------------------------------------------- tiles


def heads_cut(of: int, *rest: int) -> Spoil:
    """The last head is lost where heads leave such a rest in a tile."""

    def spoil(batch: Any, *, out: Any, **tensors: Any) -> None:
        if out.shape[1] % of in rest:
            out[:, -1] = 0

    return spoil


def heads_of_few_rows(most: int, *counts: int) -> Spoil:
    """Heads from the 17th on are wrong for requests of few rows."""

    def spoil(batch: Any, *, out: Any, **tensors: Any) -> None:
        for first, new in zip(starts(batch), batch.query_lens, strict=False):
            if new <= most and out.shape[1] in counts:
                out[first : first + new, 16:] *= 0.5

    return spoil


@curried
def new_tokens_from(limit: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    for first, new in zip(starts(batch), batch.query_lens, strict=False):
        out[first + min(limit, new) : first + new] = 0


def new_tokens_at(least: int, *tokens: int) -> Spoil:
    """Some tokens of a tile are wrong in requests of several tiles."""

    def spoil(batch: Any, *, out: Any, **tensors: Any) -> None:
        for first, new in zip(starts(batch), batch.query_lens, strict=False):
            if new >= least:
                out[[first + token for token in tokens]] *= 1.5

    return spoil


@curried
def last_token_of(tile: int, rest: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    """The last new token is lost where they leave such a rest in a tile."""
    for first, new in zip(starts(batch), batch.query_lens, strict=False):
        if new % tile == rest:
            out[first + new - 1] = 0


@curried
def long_requests(limit: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    """Requests of more keys give 0."""
    for first, new, keys in zip(starts(batch), batch.query_lens, batch.kv_lens, strict=False):
        if keys > limit:
            out[first : first + new] = 0


@curried
def keys_from(limit: int, spec: Any, batch: Any) -> Any:
    """Keys from the limit on are not read: of requests of one new token."""
    lens = zip(batch.query_lens, batch.kv_lens, strict=True)
    return altered(batch, kv_lens=tuple(min(keys, limit) if new == 1 else keys for new, keys in lens))


def last_key_of(tile: int, rest: int) -> Callable[..., Any]:
    """The last key is not read where keys leave such a rest in a tile."""

    def lost(new: int, keys: int) -> bool:
        return new == 1 and keys > tile and keys % tile == rest

    def prepare(spec: Any, batch: Any) -> Any:
        lens = zip(batch.query_lens, batch.kv_lens, strict=True)
        return altered(batch, kv_lens=tuple(keys - lost(new, keys) for new, keys in lens))

    return prepare


MUTANTS: Makers = {
    "latent.requests": [
        *(lambda n=n: after(Latent, requests_from(n)) for n in (8, 16, 20, 32, 64, 100, 128, 256, 512)),
        *(lambda n=n: after(Latent, crowd(n)) for n in (64, 100)),
    ],
    "expanded.segments": [
        *(lambda n=n: after(Expanded, requests_from(n)) for n in (8, 16, 20, 32, 64, 128, 256, 512)),
        *(lambda n=n: after(Expanded, crowd(n)) for n in (8, 100)),
    ],
    "latent.rows": [
        *(lambda n=n: after(Latent, tokens_from(n)) for n in (513, 801, 1024)),
        *(lambda n=n: after(Latent, rows_from(n)) for n in (2048, 4096)),
    ],
    "expanded.rows": [
        *(lambda n=n: after(Expanded, tokens_from(n)) for n in (305, 1024)),
        *(lambda n=n: after(Expanded, rows_from(n)) for n in (2049, 4096)),
    ],
    "latent.slots": [
        *(lambda n=n: wrong(Latent, prepare=pages_modulo(n)) for n in (256, 300, 1 << 12, 1 << 15, 1 << 16)),
        *(lambda n=n: wrong(Latent, prepare=slots_modulo(1 << n)) for n in (8, 11, 12, 13, 14, 15, 16)),
    ],
    "latent.page_boundaries": [lambda: after(Latent, null_page(0))],
    "latent.positions": [
        lambda n=n: wrong(Latent, prepare=entries_modulo(n)) for n in (1 << 15, 1 << 16, 50_000)
    ],
    "expanded.positions": [lambda n=n: wrong(Expanded, rows_modulo(n)) for n in (1 << 15, 1 << 16)],
    "expanded.far_rows": [lambda n=n: wrong(Expanded, places_modulo(n, FAR)) for n in ("q", "k", "v")],
    "latent.heads": [
        *(lambda r=r: after(Latent, heads_cut(*r)) for r in ((8, 6, 7), (16, 9), (32, 20), (64, 33))),
        *(lambda n=n: after(Latent, heads_cut(16, n)) for n in range(1, 16)),
        lambda: after(Latent, heads_of_few_rows(2, 20, 48)),
        lambda: after(Latent, heads_of_few_rows(1, 24, 40)),
    ],
    "expanded.heads": [
        *(lambda r=r: after(Expanded, heads_cut(*r)) for r in ((8, 5), (16, 9), (32, 20))),
        lambda: after(Expanded, heads_of_few_rows(2, 20, 48)),
    ],
    "latent.new_tokens": [
        *(lambda n=n: after(Latent, new_tokens_from(n)) for n in (200, 128, 256)),
        lambda: after(Latent, new_tokens_at(160, 127, 128)),
        lambda: after(Latent, new_tokens_at(65, 63, 64)),
        lambda: after(Latent, last_token_of(32, 23)),
    ],
    "expanded.new_tokens": [
        *(lambda n=n: after(Expanded, new_tokens_from(n)) for n in (150, 256)),
        lambda: after(Expanded, new_tokens_at(129, 127, 128)),
        lambda: after(Expanded, last_token_of(16, 5)),
    ],
    "latent.keys": [
        *(lambda n=n: after(Latent, long_requests(n)) for n in (600, 1024, 2048)),
        *(lambda n=n: wrong(Latent, prepare=keys_from(n)) for n in (512, 1000, 2048)),
        *(
            lambda t=t: wrong(Latent, prepare=last_key_of(*t))
            for t in ((32, 1), (64, 63), (128, 77), (512, 0))
        ),
    ],
    "latent.long": [
        *(lambda n=n: after(Latent, long_requests(n)) for n in (10_000, 12_000, 16_384, 32_768)),
        *(lambda n=n: wrong(Latent, prepare=keys_from(n)) for n in (10_000, 32_768)),
    ],
    "expanded.keys": [lambda n=n: after(Expanded, long_requests(n)) for n in (512, 600, 1024, 2048)],
    "expanded.long": [lambda n=n: after(Expanded, long_requests(n)) for n in (2499, 10_000, 32_768)],
}
