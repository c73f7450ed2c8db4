"""The expanded path: keys and values are rebuilt per head from the latent cache, and attended as usual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla.config import MLAConfig
from mla.layer.expansion import rebuilt_bytes
from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import ExpandedGroup, Piece, Round
from mla.layer.views import Projected
from mla.layer.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Rebuild:
    """Rebuilds keys and values per head from the latents of cached tokens."""

    config: MLAConfig
    weights: PackedWeights
    scratch: Workspace

    def __call__(
        self, ops: Ops, slots: torch.Tensor, pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k [s, h, n + r] and v [s, h, v] of the cached tokens at `slots` [s], in scratch memory.

        Valid until the next call.
        """
        config = self.config
        n, c, h = config.qk_nope_head_dim, config.kv_lora_rank, config.num_attention_heads
        take = self.scratch.for_round(rebuilt_bytes(config, pages.element_size(), slots.shape[0]))
        latents = take("latents", slots.shape[0], config.latent_dim)
        torch.index_select(pages.view(-1, config.latent_dim), 0, slots, out=latents)
        kv = take("kv_b", slots.shape[0], ops["kv_b_proj"].spec.out_features)
        ops["kv_b_proj"].op(self.weights.packed["kv_b_proj"], x=latents[:, :c], bias=None, out=kv)
        k_nope, v = kv.unflatten(1, (h, -1)).split((n, config.v_head_dim), dim=2)
        k = take("k", slots.shape[0], h, config.qk_head_dim)
        k[..., :n] = k_nope
        k[..., n:] = latents[:, None, c:]
        return k, v


@dataclass(frozen=True, eq=False)
class ExpandedPath:
    """What a step does with the requests that are cheaper expanded."""

    scratch: Workspace
    rebuild: Callable[[Ops, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # see `Rebuild`
    qk_nope_head_dim: int
    interleaved: bool
    softmax_scale: float
    lse_optional: bool  # of the op

    def run(self, ops: Ops, projected: Projected, group: ExpandedGroup, pages: torch.Tensor) -> None:
        """Rebuild k and v of the context round by round and run multi-head attention.

        Takes `projected.q` not yet rotated and `pages` [pages, page, c + r]; writes the group's rows of
        `projected.heads`.
        """
        q = self.scratch.rows("expanded_q", projected.q, group.tokens)
        rotary = q[..., self.qk_nope_head_dim :]
        ops["rotate_query"].op(x=rotary, cos_sin=group.cos_sin, interleaved=self.interleaved, out=rotary)
        target = self.scratch.target("expanded_heads", projected.heads, group.tokens, q.shape[0])
        if len(group.rounds) == 1:
            self._one_round(ops, group.rounds[0], q, pages, target)
        else:
            self._merge_rounds(ops, group, q, pages, target)
        self.scratch.put(projected.heads, group.tokens, target)

    def _one_round(
        self, ops: Ops, only: Round, q: torch.Tensor, pages: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attend the whole context at once: there is nothing to merge, so nobody reads the log-sum-exp."""
        k, v = self.rebuild(ops, only.slots, pages)
        lse = None if self.lse_optional else self._lse(q)
        for piece in only.pieces:
            rows = piece.queries
            self._attend(ops, piece, q, k, v, out[rows], None if lse is None else lse[rows])

    def _lse(self, q: torch.Tensor) -> torch.Tensor:
        return self.scratch.take("lse", *q.shape[:2], dtype=torch.float32)

    def _merge_rounds(
        self,
        ops: Ops,
        group: ExpandedGroup,
        q: torch.Tensor,
        pages: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend round by round, merging in fp32: rounding after every round would add up."""
        lse = self._lse(q)
        total = self.scratch.take("merged", *out.shape, dtype=torch.float32)
        for part in group.rounds:
            k, v = self.rebuild(ops, part.slots, pages)
            for piece in part.pieces:
                rows = piece.queries
                part_out = self.scratch.take("part_out", *out[rows].shape)
                part_lse = self.scratch.take("part_lse", *lse[rows].shape, dtype=torch.float32)
                self._attend(ops, piece, q, k, v, part_out, part_lse)
                if piece.merge:
                    _merge(total[rows], lse[rows], part_out, part_lse)
                else:
                    total[rows], lse[rows] = part_out, part_lse
        out.copy_(total)

    def _attend(
        self,
        ops: Ops,
        piece: Piece,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Attend one piece into out and lse, which hold its queries only."""
        ops["expanded_attention"].op(
            piece.state, q=q[piece.queries], k=k, v=v, softmax_scale=self.softmax_scale, out=out, lse=lse
        )


def _merge(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Merge two attentions over disjoint keys, in place: weights are exp(lse), normalised."""
    total = torch.logaddexp(lse, new_lse)
    old_weight, new_weight = ((part - total).exp()[..., None] for part in (lse, new_lse))
    out.mul_(old_weight).add_(new_out * new_weight)
    lse.copy_(total)
