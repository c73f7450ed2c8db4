"""A step on one share of the context: all ranks' queries attend this rank's tokens, and parts are merged.

Queries are exchanged for some new tokens, and results. The out of attention and its log-sum-exp travel in one
message, row by row: a message costs more than its few bytes do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mla.config import MLAConfig
from mla.layer.forward import Step
from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import StepPlan
from mla.layer.workspace import Absorbed, StepViews, Workspace
from mla.parallel.cache import Part, ShardedBatch
from mla.parallel.groups import Groups

FP32 = torch.float32


@dataclass(frozen=True, eq=False)
class Merging:
    """Memory in which `merge` works."""

    weights: torch.Tensor  # [n, ..., 1] fp32
    merged: torch.Tensor  # [..., c] fp32
    part: torch.Tensor  # [..., c] fp32

    @classmethod
    def of(cls, parts: torch.Tensor, scratch: Workspace) -> Merging:
        """Return memory to merge parts [n, ..., c] in, which `scratch` holds."""
        count, *rows, c = parts.shape
        return cls(
            scratch.take("merge_weights", count, *rows, 1, dtype=FP32),
            scratch.take("merge_sum", *rows, c, dtype=FP32),
            scratch.take("merge_part", *rows, c, dtype=FP32),
        )


def merge(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, memory: Merging | None = None) -> None:
    """Merge attention over disjoint keys: parts [n, ..., c] with natural lse [n, ...] fp32, to out [..., c].

    Each part weighs exp(lse) of the whole. One without keys is 0 with lse -inf, as ops write it, and weighs
    nothing; some part must have keys, as every token sees itself. Sums are in fp32 and rounded once. With
    `memory`, nothing is allocated.
    """
    held = memory or Merging.of(parts, Workspace(out.dtype, out.device))
    torch.softmax(lse[..., None], dim=0, out=held.weights)
    held.merged.copy_(parts[0]).mul_(held.weights[0])
    for index in range(1, len(parts)):
        held.merged.addcmul_(held.part.copy_(parts[index]), held.weights[index])
    out.copy_(held.merged)


@dataclass(frozen=True, eq=False)
class Ordered:
    """Memory for what attention has in another order than the step."""

    q: torch.Tensor  # [t, world h, c + r]: as the rows of attention have them
    out: torch.Tensor  # [t, world h, c]: in the order of the step again
    lse: torch.Tensor  # [t, world h] fp32


@dataclass(frozen=True, eq=False)
class Exchange:
    """Scratch memory for t new tokens of a step, of which this rank has h heads, and views of it."""

    gathered: torch.Tensor  # [world, t, h, c + r]: queries, as they arrive
    q: torch.Tensor  # [t, world h, c + r]: a copy by token; of one token, the same memory
    out: torch.Tensor  # [t, world h, c]: attention over this rank's tokens
    lse: torch.Tensor  # [t, world h] fp32
    ordered: Ordered | None
    sent: torch.Tensor  # [world, t, h, width]: rows of out and lse
    received: torch.Tensor  # [world, t, h, width]
    merging: Merging

    @classmethod
    def of(
        cls, scratch: Workspace, world: int, shape: tuple[int, int, int], c: int, ordered: bool
    ) -> Exchange:
        """Return memory for this rank's queries of `shape` [t, h, c + r], which `scratch` holds.

        `ordered`: attention has its tokens in another order.
        """
        tokens, h, width = shape
        every = (tokens, world * h)
        row = _row(c, scratch.itemsize)
        again = None
        if ordered:
            again = Ordered(
                scratch.take("ordered_q", *every, width),
                scratch.take("ordered_out", *every, c),
                scratch.take("ordered_lse", *every, dtype=FP32),
            )
        gathered = scratch.take("gathered", world, *shape)
        received = scratch.take("received", world, tokens, h, row)
        return cls(
            gathered,
            gathered.view(*every, width) if tokens == 1 else scratch.take("gathered_q", *every, width),
            scratch.take("context_out", *every, c),
            scratch.take("context_lse", *every, dtype=FP32),
            again,
            scratch.take("sent", world, tokens, h, row),
            received,
            Merging.of(received[..., :c], scratch),
        )

    @cached_property
    def _copies(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Views to copy: the queries by token, then out and lse by rank, target and source."""
        world = self.sent.shape[0]
        out, lse = (self.out, self.lse) if self.ordered is None else (self.ordered.out, self.ordered.lse)
        by_rank = lambda x: x.unflatten(1, (world, -1)).transpose(0, 1)  # noqa: E731
        return (
            (by_rank(self.q), self.gathered),
            (self.sent[..., : out.shape[-1]], by_rank(out)),
            (_lse(self.sent), by_rank(lse)),
        )

    def gather(self, groups: Groups, q: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """Return the queries [t, world h, c + r] of all ranks, of which this one has q [t, h, c + r]."""
        groups.gather_context(q, self.gathered)
        if q.shape[0] > 1:
            target, source = self._copies[0]
            target.copy_(source)
        if order is None or self.ordered is None:
            return self.q
        return torch.index_select(self.q, 0, order, out=self.ordered.q)

    def merge(self, groups: Groups, back: torch.Tensor | None, out: torch.Tensor) -> None:
        """Merge what all ranks found for this one's heads, and write it to out [t, h, c]."""
        if back is not None and self.ordered is not None:
            torch.index_select(self.out, 0, back, out=self.ordered.out)
            torch.index_select(self.lse, 0, back, out=self.ordered.lse)
        for target, source in self._copies[1:]:
            target.copy_(source)
        groups.exchange_context(self.sent, self.received)
        merge(*self._found, out, self.merging)

    @cached_property
    def _found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Out [world, t, h, c] and lse [world, t, h] of every rank."""
        return self.received[..., : self.out.shape[-1]], _lse(self.received)


def _lse(rows: torch.Tensor) -> torch.Tensor:
    """Return the lse [...] of rows [..., width] of out and lse: their last four bytes."""
    return rows.view(FP32)[..., -1]


def _row(c: int, itemsize: int) -> int:
    """Return the width of a row of out and lse: with what aligns the lse, and the elements that it takes."""
    per = max(1, FP32.itemsize // itemsize)
    return -(-c // per) * per + per


def scratch_per_token(config: MLAConfig, dcp: int, itemsize: int) -> int:
    """Return the bytes that an `Exchange` takes at most, for one new token; `config`: of one rank."""
    heads, c = config.num_attention_heads, config.kv_lora_rank
    numbers = 3 * config.latent_dim + 2 * c + 2 * _row(c, itemsize)  # of queries, and of results
    weights = 3 * FP32.itemsize  # lse twice, and what a part weighs
    return dcp * heads * (numbers * itemsize + weights) + heads * 2 * c * FP32.itemsize


@dataclass(frozen=True, eq=False)
class ContextPath:
    """Absorbed attention over a context that is spread over ranks."""

    config: MLAConfig  # with this rank's heads
    weights: PackedWeights
    scratch: Workspace
    views: StepViews
    groups: Groups

    def tokens_at_once(self, workspace: int) -> int:
        """Return how many tokens' queries and results of all ranks fit into so many bytes, at least one."""
        per_token = scratch_per_token(self.config, self.groups.layout.dcp, self.scratch.itemsize)
        return max(1, workspace // per_token)

    def run(self, ops: Ops, views: Absorbed, plan: StepPlan, pages: torch.Tensor) -> None:
        """Attend with `views.q_nope` and `views.q_pe`, not yet rotated, and write `views.heads`."""
        packed, rope = self.weights.packed, self.config.rope_interleave
        ops["w_uk"].op(packed["w_uk"], x=views.q_nope, out=views.latent_nope)
        ops["rotate_query"].op(x=views.q_pe, cos_sin=plan.cos_sin, interleaved=rope, out=views.latent_pe)
        assert plan.absorbed is not None
        for part, state in plan.absorbed.state:
            held = self._held(part)
            q = held.gather(self.groups, views.latent_q[part.tokens], part.order)
            self._attend(ops, q, held, part, state, pages)
            held.merge(self.groups, part.back, views.latent_out[part.tokens])
        ops["w_uv"].op(packed["w_uv"], x=views.latent_out, out=views.heads)

    def _held(self, part: Part) -> Exchange:
        """Return memory for the exchanges of a part."""
        count, ordered = part.tokens.stop - part.tokens.start, part.order is not None
        own, world = self.config, self.groups.layout.dcp
        shape = (count, own.num_attention_heads, own.latent_dim)
        return self.scratch.views(
            ("exchange", count, ordered),
            lambda: Exchange.of(self.scratch, world, shape, own.kv_lora_rank, ordered),
        )

    def _attend(
        self, ops: Ops, q: torch.Tensor, held: Exchange, part: Part, state: Any, pages: torch.Tensor
    ) -> None:
        """Attend this rank's tokens with q [t, world h, c + r], and write `held.out` and `held.lse`."""
        ops["latent_attention"].op(
            state,
            q=q,
            cache=pages,
            block_table=part.rows.block_table,
            kv_lens=part.rows.kv_lens_device,
            cu_q=part.rows.cu_q,
            softmax_scale=self.config.softmax_scale,
            out=held.out,
            lse=held.lse,
        )


@dataclass(frozen=True, eq=False)
class ContextStep(Step):
    """`Step` where the context is spread over ranks."""

    context: ContextPath

    def run(  # type: ignore[override]
        self,
        ops: Ops,
        hidden: torch.Tensor,  # [T, d]
        batch: ShardedBatch,
        plan: StepPlan,
        pages: torch.Tensor,  # [pages, page, c + r]: this rank's
        out: torch.Tensor,  # [T, d]: of this rank's heads
    ) -> None:
        """Write this rank's new latents to `pages`, and its heads' part of the output to `out`."""
        projected = self._project(ops, hidden)
        self._scale_queries(projected.q, batch)  # type: ignore[arg-type]
        self._write_own(ops, projected.kv_a, batch, plan, pages)
        if plan.absorbed is not None:
            views = self.views.absorbed(projected, slice(0, hidden.shape[0]))
            self.context.run(ops, views, plan, pages)
        self._linear(ops, "o_proj", projected.heads_flat, out, bias="o_proj.bias")

    def _write_own(
        self, ops: Ops, kv_a: torch.Tensor, batch: ShardedBatch, plan: StepPlan, pages: torch.Tensor
    ) -> None:
        count, scratch = batch.own.shape[0], self.context.scratch
        if not count:
            return
        rows, angles = kv_a, plan.cos_sin
        if count < batch.num_tokens:
            rows = torch.index_select(kv_a, 0, batch.own, out=scratch.take("own_kv_a", count, kv_a.shape[1]))
            angles = scratch.take("own_cos_sin", count, plan.cos_sin.shape[1], dtype=torch.float32)
            torch.index_select(plan.cos_sin, 0, batch.own, out=angles)
        ops["write_latent"].op(
            kv_a=rows,
            weight=self.weights.vectors["kv_a_layernorm.weight"],
            eps=self.config.rms_norm_eps,
            cos_sin=angles,
            interleaved=self.config.rope_interleave,
            slots=batch.slots,
            cache=pages,
        )
