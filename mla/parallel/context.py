"""A step on one share of the context: all ranks' queries attend this rank's tokens, and parts are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mla.config import MLAConfig
from mla.layer.forward import Step
from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import StepPlan
from mla.layer.workspace import Absorbed, StepViews, Workspace
from mla.parallel.batch import Part, ShardedBatch
from mla.parallel.exchange import Exchange, scratch_per_token
from mla.parallel.groups import Groups


@dataclass(frozen=True, eq=False)
class ContextPath:
    """Absorbed attention over a context that is spread over ranks; see `exchange.merge`."""

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
