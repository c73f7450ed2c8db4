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
from mla.layer.views import Absorbed, StepViews
from mla.layer.workspace import Workspace
from mla.parallel.batch import Part, ShardedBatch
from mla.parallel.groups import Groups


@dataclass(frozen=True, eq=False)
class ContextPath:
    """Absorbed attention over a context that is spread over ranks; see `merge`."""

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
            q = self._gather(views.latent_q[part.tokens], part)
            out, lse = self._attend(ops, q, part, state, pages)
            found = self._exchange("out", out, part), self._exchange("lse", lse, part)
            merge(*found, views.latent_out[part.tokens])
        ops["w_uv"].op(packed["w_uv"], x=views.latent_out, out=views.heads)

    def _gather(self, q: torch.Tensor, part: Part) -> torch.Tensor:
        """Return the queries [t, world h, c + r] of all ranks, in the order of the part's rows."""
        world, (tokens, heads, width) = self.groups.layout.dcp, q.shape
        parts = self.scratch.take("gathered_parts", world, *q.shape)
        self.groups.gather_context(q, parts)
        together = self.scratch.take("gathered_q", tokens, world * heads, width)
        torch.stack(parts.unbind(0), dim=1, out=together.view(tokens, world, heads, width))
        if part.order is None:
            return together
        ordered = self.scratch.take("ordered_q", *together.shape)
        return torch.index_select(together, 0, part.order, out=ordered)

    def _attend(
        self, ops: Ops, q: torch.Tensor, part: Part, state: Any, pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [t, world h, c] and lse [t, world h] of this rank's tokens."""
        out = self.scratch.take("context_out", *q.shape[:2], self.config.kv_lora_rank)
        lse = self.scratch.take("context_lse", *q.shape[:2], dtype=torch.float32)
        ops["latent_attention"].op(
            state,
            q=q,
            cache=pages,
            block_table=part.rows.block_table,
            kv_lens=part.rows.kv_lens_device,
            cu_q=part.rows.cu_q,
            softmax_scale=self.config.softmax_scale,
            out=out,
            lse=lse,
        )
        return out, lse

    def _exchange(self, name: str, x: torch.Tensor, part: Part) -> torch.Tensor:
        """Return [world, t, h, ...]: of x [t, world h, ...], this rank's heads as every rank has them."""
        if part.back is not None:
            back = self.scratch.take(f"back_{name}", *x.shape, dtype=x.dtype)
            x = torch.index_select(x, 0, part.back, out=back)
        world = self.groups.layout.dcp
        shape = (world, x.shape[0], x.shape[1] // world, *x.shape[2:])
        sent = self.scratch.take(f"sent_{name}", *shape, dtype=x.dtype)
        sent.copy_(x.unflatten(1, (world, -1)).transpose(0, 1))
        received = self.scratch.take(f"received_{name}", *shape, dtype=x.dtype)
        self.groups.exchange_context(sent, received)
        return received


def scratch_per_token(config: MLAConfig, dcp: int, itemsize: int) -> int:
    """Return the bytes of queries and results of all ranks, for one new token; `config`: of one rank."""
    c = config.kv_lora_rank
    copies = 3 * config.latent_dim + 4 * c  # of queries, and of results
    return dcp * config.num_attention_heads * (copies * itemsize + 2 * c * 4)


def merge(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
    """Merge attention over disjoint keys: parts [n, ..., c] with natural lse [n, ...] fp32, to out [..., c].

    Each part weighs exp(lse) of the whole. One without keys has lse -inf and weighs nothing, whatever it
    holds; where no part has keys, out is 0. Sums are in fp32 and rounded once.
    """
    top = lse.amax(dim=0)
    weights = (lse - top.masked_fill(top == -torch.inf, 0)).exp_()  # no infinity is taken from another
    weights /= weights.sum(dim=0).clamp_min_(torch.finfo(torch.float32).tiny)
    weighed = parts.float().mul_(weights[..., None])
    out.copy_(weighed.masked_fill_((weights == 0)[..., None], 0).sum(dim=0))


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
