"""A form of arithmetic as ops of the contract, to put into a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.rounding.forms import Form
from mla.reference import REFERENCE
from mla_backends.api import FusedOp

Linear, Batched, Latent, Expanded = (
    type(REFERENCE[kind]) for kind in ("linear", "batched_linear", "latent_attention", "expanded_attention")
)


def future(queries: int, keys: int) -> torch.Tensor:
    """Return which keys a causal query may not see, [queries, keys]."""
    return torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]


class _OfForm:
    lse_optional = False

    def __init__(self, form: Form) -> None:
        self._form = form

    def _attend(self, q: Any, k: Any, v: Any, scale: float, hidden: torch.Tensor, out: Any, lse: Any) -> None:
        """Attend one request: q [t, h, dk], k [s, 1 or h, dk], v [s, 1 or h, dv]."""
        q_wide, k_wide, v_wide = (x.transpose(0, 1).float() for x in (q, k, v))
        value, sums = self._form.attend(q_wide, k_wide, v_wide, scale, hidden, q.dtype)
        out.copy_(value.transpose(0, 1))
        lse.copy_(sums[..., 0].T)


class FormLinear(_OfForm, Linear):  # type: ignore[misc, valid-type]
    def __call__(self, packed: Any, *, x: Any, bias: Any, out: Any) -> None:
        product = self._form.product(x.float(), packed.data.float())
        out.copy_(product if bias is None else product + bias)


class FormBatched(_OfForm, Batched):  # type: ignore[misc, valid-type]
    def __call__(self, packed: Any, *, x: Any, out: Any) -> None:
        product = self._form.product(x.transpose(0, 1).float(), packed.data.mT.float())
        out.copy_(product.transpose(0, 1))


class FormLatent(_OfForm, Latent):  # type: ignore[misc, valid-type]
    def prepare(self, spec: Any, batch: Any) -> Any:
        return batch

    def __call__(
        self, state: Any, *, q: Any, cache: Any, softmax_scale: float, out: Any, lse: Any, **tables: Any
    ) -> None:
        parts = (x.split(state.query_lens) for x in (q, out, lse))
        for pages, length, *rows in zip(state.block_table, state.kv_lens, *parts, strict=True):
            own_q, own_out, own_lse = rows
            used = pages[: -(-length // cache.shape[1])].long()
            keys = cache[used].flatten(0, 1)[:length, None]
            values = keys[..., : out.shape[2]]
            self._attend(own_q, keys, values, softmax_scale, future(len(own_q), length), own_out, own_lse)


class FormExpanded(_OfForm, Expanded):  # type: ignore[misc, valid-type]
    def __call__(
        self, state: Any, *, q: Any, k: Any, v: Any, softmax_scale: float, out: Any, lse: Any
    ) -> None:
        queries, keys = state.query_lens, state.kv_lens
        lens = (queries, keys, keys, queries, queries)
        parts = (x.split(n) for x, n in zip((q, k, v, out, lse), lens, strict=True))
        for one_q, one_k, one_v, one_out, one_lse in zip(*parts, strict=True):
            hidden = future(len(one_q), len(one_k)) & state.causal
            self._attend(one_q, one_k, one_v, softmax_scale, hidden, one_out, one_lse)


OPS: dict[str, Callable[[Form], FusedOp]] = {
    "linear": FormLinear,
    "batched_linear": FormBatched,
    "latent_attention": FormLatent,
    "expanded_attention": FormExpanded,
}


def ops(form: Form) -> dict[str, FusedOp]:
    """Return the ops of a form, by kind."""
    return {kind: made(form) for kind, made in OPS.items()}
