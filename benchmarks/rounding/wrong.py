"""Attention and products that are a little wrong: less precise than their dtype, or off by a trifle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.rounding.forms import (
    REFERENCE,
    TILE,
    Attend,
    Form,
    Pair,
    Tensor,
    in_order,
    logits_of,
    narrow,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def given(change: Callable[[Tensor], Tensor]) -> Attend:
    """Return attention on queries that were changed."""
    return lambda q, *rest: REFERENCE.attend(change(q), *rest)


def spoilt(change: Callable[[Tensor], Tensor]) -> Attend:
    """Return attention whose output is changed."""

    def attend(*given: object) -> Pair:
        out, lse = REFERENCE.attend(*given)  # type: ignore[arg-type]
        return change(out), lse

    return attend


def tf32(x: Tensor) -> Tensor:
    """Return x with the ten bits of mantissa that matrix units keep of float32."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def last_head(out: Tensor) -> Tensor:
    """Return out [h, t, d] with one head 5 % off."""
    return torch.cat((out[:-1], 1.05 * out[-1:]))


def leftover(out: Tensor) -> Tensor:
    """Return out with a little of another row, as scratch memory may hold it."""
    return out + 2e-3 * out.flatten(0, 1).roll(1, 0).view_as(out)


def narrow_scores(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend with logits in the op's dtype."""
    logits = narrow(logits_of(q, k, scale, hidden), dtype)
    return logits.softmax(-1) @ v, logits.logsumexp(-1, keepdim=True)


def narrow_sums(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend tile by tile, and keep the sum of values in the op's dtype."""
    logits = logits_of(q, k, scale, hidden)
    lse = logits.logsumexp(-1, keepdim=True)
    weights, total = (logits - logits.amax(-1, keepdim=True)).exp(), q.new_zeros(*q.shape[:2], v.shape[2])
    for start in range(0, k.shape[1], TILE):
        keys = slice(start, start + TILE)
        total = narrow(total + weights[..., keys] @ v[:, keys], dtype)
    return total / weights.sum(-1, keepdim=True), lse


# With the dtypes in which they are wrong. (Logits in float16 err about as much as float16 probabilities.)
WRONG: tuple[tuple[Form, tuple[torch.dtype, ...]], ...] = (
    (in_order("TF32 products", lambda x, weight: tf32(x) @ tf32(weight).mT), (F32,)),
    (replace(REFERENCE, name="queries in float16", attend=given(lambda q: narrow(q, F16))), (F32,)),
    (replace(REFERENCE, name="queries in bfloat16", attend=given(lambda q: narrow(q, BF16))), (F32,)),
    (replace(REFERENCE, name="2e-3 of another row", attend=spoilt(leftover)), (F32,)),
    (replace(REFERENCE, name="attention 1 % off", attend=spoilt(lambda out: 1.01 * out)), (F32, F16)),
    (replace(REFERENCE, name="one head of four 5 % off", attend=spoilt(last_head)), (F32, F16, BF16)),
    (replace(REFERENCE, name="logits in bfloat16", attend=narrow_scores), (BF16,)),
    (replace(REFERENCE, name="sums in the dtype, 2500 keys", attend=narrow_sums), (F16, BF16)),
)
