"""Faults that either attention op can have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from wrong_attention.base import PAGE, curried, wrong


@curried
def as_contiguous(name: str, **tensors: Any) -> dict[str, Any]:
    x = tensors[name]
    return {name: x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())}


def rows_moved(batch: Any, *, out: Any, **tensors: Any) -> None:
    if len(set(batch.query_lens)) > 1:
        out.copy_(out.roll(1, 0))


def many_heads(batch: Any, *, out: Any, **tensors: Any) -> None:
    out[:, PAGE:] = 0


def base_two(batch: Any, *, lse: Any, **tensors: Any) -> None:
    lse.div_(math.log(2))


def no_maximum(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    """exp() of a large logit is infinite, and infinity over infinity is NaN."""
    out.masked_fill_((lse.exp() == torch.inf)[..., None], torch.nan)


def scaled_in_place(right: Any, batch: Any, *, q: Any, softmax_scale: float, **tensors: Any) -> None:
    right(q=q.mul_(softmax_scale), softmax_scale=1.0, **tensors)


def usual_scale(width: int) -> Callable[..., dict[str, Any]]:
    return lambda **tensors: {"softmax_scale": width**-0.5}


def first_layers(name: str) -> Any:
    """Return a call that keeps a tensor of the first layer for all that share the plan."""

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        seen = kept.setdefault(id(batch), (batch, tensors[name].clone()))
        right(**{**tensors, name: seen[1]})

    kept: dict[int, Any] = {}
    return call


def without_lse(base: type, call: Callable[..., None] | None = None) -> Any:
    """Return an op that is right only as long as it is given an lse to write."""

    def choose(right: Any, batch: Any, *, lse: Any, out: Any, **tensors: Any) -> None:
        if lse is not None:
            right(lse=lse, out=out, **tensors)
        elif call is None:  # unnormalised
            right(lse=None, out=out, **tensors)
            out.mul_(1.1)

    return wrong(base, choose, lse_optional=True)


def nothing(*arguments: Any, **tensors: Any) -> None:
    """Leave `out` as it was."""


def waits(spec: Any, batch: Any) -> Any:
    torch.zeros(1).to("cpu", copy=True)
    return batch


def plus_infinity(batch: Any, *, lse: Any, **tensors: Any) -> None:
    lse[lse == -torch.inf] = torch.inf


def empty_unwritten(batch: Any, *, out: Any, lse: Any, **tensors: Any) -> None:
    out[lse == -torch.inf] = torch.nan


@curried
def made_for(width: int, batch: Any, *, out: Any, **tensors: Any) -> None:
    if out.shape[2] != width:
        out[..., -1] += 1
