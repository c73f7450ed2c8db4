"""Attention that takes operands to lie otherwise than they do, writes around them, or is not precise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from wrong_attention.base import Expanded, Latent, Makers, after, curried, given, starts, wrong
from wrong_attention.both import as_contiguous

Spoil = Callable[..., None]


def padded(name: str, rows: int, value: float = 0.0) -> Spoil:
    """Rows of an operand are rounded up to a multiple, and written to the end."""

    def spoil(batch: Any, **tensors: Any) -> None:
        part = tensors[name]
        end = part.storage_offset() + part.shape[0] * part.stride(0)
        room = part.untyped_storage().nbytes() // part.element_size() - end
        more = min(-part.shape[0] % rows, room // part.stride(0))
        part.as_strided((max(0, more), *part.shape[1:]), part.stride(), end).fill_(value)

    return spoil


@curried
def before(name: str, batch: Any, **tensors: Any) -> None:
    """The row before the first one is written."""
    part = tensors[name]
    part.as_strided(part.shape[1:], part.stride()[1:], part.storage_offset() - part.stride(0)).fill_(0)


@curried
def through_a_copy(name: str, right: Any, batch: Any, **tensors: Any) -> None:
    """An output that is not contiguous is written to a copy, and the copy is lost."""
    right(**{**tensors, name: tensors[name].contiguous()})


def dense_table(right: Any, batch: Any, *, block_table: Any, **tensors: Any) -> None:
    """The block table is taken to be dense."""
    lens, cu_q = tensors["kv_lens"], tensors["cu_q"]
    dense = block_table.as_strided(block_table.shape, (block_table.shape[1], 1), block_table.storage_offset())
    size, q, out = tensors["cache"].shape[1], tensors["q"], tensors["out"]
    right(block_table=block_table, **tensors)
    if torch.equal(dense, block_table):
        return
    for request, length in enumerate(lens.tolist()):
        pages = dense[request, : -(-length // size)].long()
        keys = tensors["cache"][pages].flatten(0, 1)[:length].float()
        last = int(cu_q[request + 1]) - 1
        weights = (q[last].float() @ keys.T * tensors["softmax_scale"]).softmax(-1)
        out[last] = (weights @ keys[:, : out.shape[2]]).to(out.dtype)


@curried
def sums_in(
    dtype: torch.dtype, absorbed: bool, batch: Any, *, q: Any, out: Any, softmax_scale: float, **tensors: Any
) -> None:
    """Values are summed in tiles of 64 keys, in a narrow accumulator: of requests of one new token."""
    for request, (first, new) in enumerate(zip(starts(batch), batch.query_lens, strict=False)):
        length = batch.kv_lens[request]
        if new != 1 or not length:
            continue
        keys, values = rows_of(request, length, batch, tensors, out.shape[2], absorbed)
        logits = torch.einsum("hd,shd->hs", q[first].float(), keys.expand(-1, q.shape[1], -1))
        weights = (logits * softmax_scale).softmax(-1)
        total = torch.zeros(out.shape[1:], dtype=dtype)
        for start in range(0, length, 64):
            tile = values[start : start + 64].expand(-1, q.shape[1], -1)
            total += torch.einsum("hs,shd->hd", weights[:, start : start + 64], tile).to(dtype)
        out[first] = total.to(out.dtype)


def rows_of(request: int, length: int, batch: Any, tensors: Any, width: int, absorbed: bool) -> Any:
    """Return the keys and values of a request, [s, 1 or h, d] in fp32."""
    if not absorbed:
        first = sum(batch.kv_lens[:request])
        return (tensors[name][first : first + length].float() for name in ("k", "v"))
    pages = tensors["block_table"][request, : -(-length // batch.page_size)].long()
    rows = tensors["cache"][pages].flatten(0, 1)[:length, None].float()
    return rows, rows[..., :width]


def half_logits(right: Any, batch: Any, **tensors: Any) -> None:
    """Inputs go through float16."""
    narrow = {name: x.half().to(x.dtype) for name, x in tensors.items() if name in ("q", "cache", "k", "v")}
    right(**{**tensors, **narrow})


def maximum_from_zero(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    """The running maximum starts at 0, so that exp() of very negative logits is 0."""
    out.masked_fill_((lse < -80)[..., None], 0)


@curried
def rounded_lse(dtype: torch.dtype, batch: Any, *, lse: Any, **tensors: Any) -> None:
    lse.copy_(lse.to(dtype))


@curried
def lse_plus(value: float, batch: Any, *, lse: Any, **tensors: Any) -> None:
    lse.add_(value)


MUTANTS: Makers = {
    "latent.decode": [
        *(lambda n=n: after(Latent, padded("out", n)) for n in (2, 4, 16, 64)),
        lambda: after(Latent, before("out")),
        lambda: after(Latent, before("lse")),
        lambda: after(Latent, padded("lse", 16, torch.nan)),
    ],
    "expanded.mixed": [
        *(lambda n=n: after(Expanded, padded("out", n)) for n in (2, 16, 128)),
        lambda: after(Expanded, before("out")),
    ],
    "latent.strided": [
        lambda: wrong(Latent, dense_table),
        *(lambda n=n: given(Latent, as_contiguous(n)) for n in ("lse", "out")),
        *(lambda n=n: wrong(Latent, through_a_copy(n)) for n in ("lse", "out")),
        lambda: after(Latent, padded("q", 16)),
    ],
    "latent.inputs": [
        *(lambda n=n: after(Latent, padded(n, 16)) for n in ("q", "block_table", "kv_lens", "cu_q")),
        lambda: after(Latent, before("cache")),
    ],
    "expanded.strided": [
        *(lambda n=n: given(Expanded, as_contiguous(n)) for n in ("k", "lse", "out")),
        lambda: wrong(Expanded, through_a_copy("lse")),
    ],
    "expanded.inputs": [lambda n=n: after(Expanded, padded(n, 16)) for n in ("k", "v")],
    "latent.large": [lambda: after(Latent, maximum_from_zero)],
    "expanded.large": [lambda: after(Expanded, maximum_from_zero)],
    "latent.lse": [
        lambda: after(Latent, rounded_lse(torch.bfloat16)),
        lambda: after(Latent, lse_plus(math.log(2))),
    ],
    "expanded.lse": [lambda: after(Expanded, rounded_lse(torch.float16))],
    "latent.mixed": [lambda: wrong(Latent, half_logits)],
    "expanded.history": [lambda: wrong(Expanded, half_logits)],
}
NARROW: Makers = {
    "latent.long": [lambda: after(Latent, sums_in(torch.bfloat16, True))],
    "expanded.long": [lambda: after(Expanded, sums_in(torch.bfloat16, False))],
}
