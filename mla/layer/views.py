"""What a step reads and writes: whether it fits, and views of scratch memory, reused for the same shape.

Slicing costs the host as much as a small op, and a decode step takes a dozen views, so they are made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mla.config import MLAConfig
from mla.layer.ops import Ops
from mla.layer.workspace import Tokens, Workspace
from mla_backends.api.operands import misfit


def require(name: str, x: Any, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless x is a plain tensor of this shape (None: any size) and dtype on `device`."""
    if wrong := misfit(x, shape, dtype, device):
        if hasattr(x, "pages"):
            wrong = f"is a {type(x).__name__}: pass `cache.pages[i]`, the part of layer i."
        raise ValueError(f"{name} {wrong}")


def check_batch(batch: Any, kinds: tuple[Any, ...], device: torch.device) -> None:
    """Raise ValueError unless this is a batch of these kinds on `device`, and `StaleBatch`."""
    if not isinstance(batch, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"batch must be a {names}, as `cache.extend` returns, got a {type(batch).__name__}.")
    if not batch.kv_lens:
        raise ValueError("the batch has no requests: leave such a step out.")
    batch.check_current()
    if batch.slots.device != device:
        raise ValueError(f"the batch's tables must be on {device}, and are on {batch.slots.device}.")


class Projected(NamedTuple):
    """Where the projections of a step are written."""

    first: torch.Tensor  # [T, q or q_a, then c + r]
    q_a: torch.Tensor  # [T, q_lora_rank], or q itself without one
    q_normed: torch.Tensor | None
    q_flat: torch.Tensor  # [T, h * (n + r)]
    q: torch.Tensor  # [T, h, n + r]
    kv_a: torch.Tensor  # [T, c + r]
    heads: torch.Tensor  # [T, h, v], of both paths of attention
    heads_flat: torch.Tensor  # [T, h * v]


class Absorbed(NamedTuple):
    """Queries of an absorbed group, and where its latent queries and outputs go."""

    q_nope: torch.Tensor  # [t, h, n]
    q_pe: torch.Tensor  # [t, h, r]
    latent_q: torch.Tensor  # [t, h, c + r]
    latent_nope: torch.Tensor  # its first c
    latent_pe: torch.Tensor  # its last r
    latent_out: torch.Tensor  # [t, h, c]
    lse: torch.Tensor | None  # [t, h] fp32; None where the op need not write what nobody reads
    heads: torch.Tensor  # [t, h, v]: the step's own rows, or memory to scatter them from


class StepViews:
    """Where the stages of a layer read and write, by the number of tokens."""

    def __init__(self, config: MLAConfig, ops: Ops, scratch: Workspace) -> None:
        self._config, self._ops, self._scratch = config, ops, scratch

    def projected(self, tokens: int) -> Projected:
        """Return where the projections of this many tokens are written."""
        return self._scratch.views(("projected", tokens), lambda: self._projected(tokens))

    def _projected(self, tokens: int) -> Projected:
        config, spec = self._config, self._ops["qkv_a_proj"].spec
        first = self._scratch.take("qkv_a", tokens, spec.out_features)
        q_a, kv_a = first.split((spec.out_features - config.latent_dim, config.latent_dim), dim=1)
        normed, q = None, q_a
        if config.q_lora_rank is not None:
            normed = self._scratch.take("q_a", *q_a.shape)
            q = self._scratch.take("q", tokens, self._ops["q_b_proj"].spec.out_features)
        per_head = q.unflatten(1, (config.num_attention_heads, config.qk_head_dim))
        heads = self._scratch.take("heads", tokens, config.num_attention_heads, config.v_head_dim)
        return Projected(first, q_a, normed, q, per_head, kv_a, heads, heads.flatten(1))

    def absorbed(self, projected: Projected, tokens: Tokens) -> Absorbed:
        """Return a group's queries and where its latent queries and outputs go."""
        if not isinstance(tokens, slice):  # the rows are copied for every step
            q = self._scratch.rows("absorbed_q", projected.q, tokens)
            return self._absorbed_memory(q, projected.heads, tokens)
        key = ("absorbed", projected.q.shape[0], tokens.start, tokens.stop)
        return self._scratch.views(
            key, lambda: self._absorbed_memory(projected.q[tokens], projected.heads, tokens)
        )

    def _absorbed_memory(self, q: torch.Tensor, heads: torch.Tensor, tokens: Tokens) -> Absorbed:
        n, c, h = self._config.qk_nope_head_dim, self._config.kv_lora_rank, self._config.num_attention_heads
        latent_q = self._scratch.take("latent_q", q.shape[0], h, self._config.latent_dim)
        latent_out = self._scratch.take("latent_out", q.shape[0], h, c)
        lse = None
        if not self._ops["latent_attention"].op.lse_optional:
            lse = self._scratch.take("lse", q.shape[0], h, dtype=torch.float32)
        target = self._scratch.target("absorbed_heads", heads, tokens, q.shape[0])
        parts = (q[..., :n], q[..., n:], latent_q, latent_q[..., :c], latent_q[..., c:])
        return Absorbed(*parts, latent_out, lse, target)
