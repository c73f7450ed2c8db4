"""Attention that is wrong on one condition more: so many heads, no mask, `lse` alone, rows that lie apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wrong_attention.base import FAR, Expanded, Latent, Makers, after, altered, curried, wrong
from wrong_attention.sizes import (
    heads_cut,
    last_token_of,
    long_requests,
    new_tokens_from,
    pages_modulo,
    places_modulo,
    requests_from,
)

Spoil = Callable[..., None]


@curried
def of_heads(least: int, spoil: Spoil, batch: Any, *, out: Any, **tensors: Any) -> None:
    """Only calls of so many heads are wrong."""
    if out.shape[1] >= least:
        spoil(batch, out=out, **tensors)


@curried
def unmasked(spoil: Spoil, batch: Any, **tensors: Any) -> None:
    """Only calls without a mask are wrong."""
    if not batch.causal:
        spoil(batch, **tensors)


@curried
def lse_alone(spoil: Spoil, batch: Any, *, lse: Any, out: Any, **tensors: Any) -> None:
    """The log-sum-exp is wrong where `out` would be."""
    spoil(batch, out=lse, lse=out, **tensors)


def in_other_pages(batch: Any, *, out: Any, **tensors: Any) -> None:
    if batch.page_size != 64:
        out.add_(0.5)


def refusing(multiple: int, op: Any) -> Any:
    """Return the op, made to refuse other numbers of heads than multiples."""
    op.unsupported_reasons = lambda spec: [f"heads come by {multiple}"] if spec.num_heads % multiple else []
    return op


@curried
def pages_modulo_of_heads(least: int, pages: int, spec: Any, batch: Any) -> Any:
    return pages_modulo(pages)(spec, batch) if spec.num_heads >= least else batch


@curried
def rows_lost(name: str, numbers: int, batch: Any, **tensors: Any) -> None:
    """Rows of an output that lie beyond are not written."""
    rows = tensors[name]
    rows[-(-numbers // rows.stride(0)) :] = torch.nan


def first_owner(spec: Any, batch: Any) -> Any:
    """A page belongs to the first request that names it, and another one reads a page of nobody."""
    table, seen = batch.block_table.clone(), set[int]()
    for request, keys in enumerate(batch.kv_lens):
        pages = table[request, : -(-keys // batch.page_size)].tolist()
        for column, page in enumerate(pages):
            if page in seen:
                table[request, column] = table[request, -1]
        seen.update(pages)
    return altered(batch, block_table=table)


def last_owner(batch: Any, *, out: Any, **tensors: Any) -> None:
    """The request that shares its first page with a later one gets nothing."""
    first = batch.block_table[:, 0].tolist()
    out[: batch.query_lens[0]] *= first.count(first[0]) == 1


MUTANTS: Makers = {
    "latent.requests": [
        *(lambda n=n: after(Latent, of_heads(16, requests_from(n))) for n in (12, 256)),
        lambda: refusing(16, after(Latent, requests_from(20))),
        lambda: after(Latent, lse_alone(requests_from(320))),
    ],
    "expanded.segments": [
        lambda: after(Expanded, of_heads(16, requests_from(12))),
        lambda: refusing(64, after(Expanded, requests_from(20))),
        lambda: after(Expanded, lse_alone(requests_from(256))),
    ],
    "latent.keys": [
        *(lambda n=n: after(Latent, of_heads(16, long_requests(n))) for n in (320, 2400)),
        lambda: refusing(64, after(Latent, long_requests(300))),
    ],
    "expanded.keys": [
        lambda: after(Expanded, of_heads(16, long_requests(324))),
        *(lambda n=n: after(Expanded, unmasked(long_requests(n))) for n in (1100, 1600)),
    ],
    "latent.long": [lambda: after(Latent, lse_alone(long_requests(2600)))],
    "expanded.long": [
        lambda: after(Expanded, lse_alone(long_requests(2600))),
        lambda: after(Expanded, unmasked(long_requests(10_000))),
    ],
    "latent.new_tokens": [
        lambda: after(Latent, of_heads(16, new_tokens_from(130))),
        lambda: refusing(16, after(Latent, new_tokens_from(160))),
        lambda: after(Latent, lse_alone(new_tokens_from(200))),
    ],
    "expanded.new_tokens": [
        lambda: after(Expanded, of_heads(16, new_tokens_from(200))),
        lambda: after(Expanded, unmasked(last_token_of(16, 11))),
    ],
    "latent.heads": [
        lambda: after(Latent, of_heads(64, new_tokens_from(10))),
        *(lambda r=r: after(Latent, lse_alone(heads_cut(*r))) for r in ((8, 5), (64, 40))),
    ],
    "expanded.heads": [
        lambda: after(Expanded, of_heads(20, new_tokens_from(10))),
        *(lambda r=r: after(Expanded, unmasked(heads_cut(*r))) for r in ((8, 5), (32, 20))),
    ],
    "latent.slots": [lambda n=n: wrong(Latent, prepare=pages_modulo_of_heads(16, n)) for n in (512, 4096)],
    "latent.page_sizes": [lambda: after(Latent, lse_alone(in_other_pages))],
    "latent.far_rows": [
        lambda: wrong(Latent, places_modulo("q", FAR)),
        lambda: after(Latent, rows_lost("out", FAR)),
    ],
    "latent.shared_pages": [
        lambda: wrong(Latent, prepare=first_owner),
        lambda: after(Latent, last_owner),
    ],
}
