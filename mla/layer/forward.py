"""`Step`: one step of the layer, op by op.

The ops come with every call, so that the same code runs them, records them or times them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla.cache.ragged_batch import RaggedBatch
from mla.config import MLAConfig
from mla.layer.absorbed import AbsorbedPath
from mla.layer.expanded import ExpandedPath, Rebuild
from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import StepPlan
from mla.layer.rope import query_factors
from mla.layer.views import Projected, StepViews
from mla.layer.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Step:
    """Queries, latents, attention on either path, output. Keeps nothing but scratch memory."""

    config: MLAConfig
    weights: PackedWeights
    views: StepViews
    absorbed: AbsorbedPath
    expanded: ExpandedPath

    def run(
        self,
        ops: Ops,
        hidden: torch.Tensor,  # [T, d]
        batch: RaggedBatch,
        plan: StepPlan,
        pages: torch.Tensor,  # [pages, page, c + r]
        out: torch.Tensor,  # [T, d]
    ) -> None:
        """Write the latents of the batch's new tokens to `pages` and the layer's output to `out`.

        Nothing is checked, and `plan` must be that of `batch`.
        """
        projected = self._project(ops, hidden)
        self._scale_queries(projected.q, batch)
        self._write_latent(ops, projected.kv_a, batch, plan, pages)
        if plan.absorbed is not None:
            self.absorbed.run(ops, projected, plan.absorbed, pages)
        if plan.expanded is not None:
            self.expanded.run(ops, projected, plan.expanded, pages)
        self._linear(ops, "o_proj", projected.heads_flat, out, bias="o_proj.bias")

    def scales(self, batch: RaggedBatch) -> bool:
        """Return whether any query's factor is other than 1."""
        scaling = self.config.query_scaling
        return scaling is not None and max(batch.kv_lens) > scaling.period

    def _project(self, ops: Ops, hidden: torch.Tensor) -> Projected:
        """Return the step's views, with q not yet rotated and kv_a neither normed nor rotated."""
        views = self.views.projected(hidden.shape[0])
        self._linear(ops, "qkv_a_proj", hidden, views.first, bias="qkv_a_proj.bias")
        if views.q_normed is not None:
            weight, eps = self.weights.vectors["q_a_layernorm.weight"], self.config.rms_norm_eps
            ops["q_a_layernorm"].op(x=views.q_a, weight=weight, eps=eps, out=views.q_normed)
            self._linear(ops, "q_b_proj", views.q_normed, views.q_flat)
        return views

    def _scale_queries(self, q: torch.Tensor, batch: RaggedBatch) -> None:
        """Scale q [T, h, n + r] by position, in place, where the config says so."""
        scaling = self.config.query_scaling
        if scaling is None or not self.scales(batch):
            return
        factors = batch.memo(scaling, lambda: query_factors(scaling, batch.positions)[:, None, None])
        q.mul_(factors)

    def _write_latent(
        self, ops: Ops, kv_a: torch.Tensor, batch: RaggedBatch, plan: StepPlan, pages: torch.Tensor
    ) -> None:
        ops["write_latent"].op(
            kv_a=kv_a,
            weight=self.weights.vectors["kv_a_layernorm.weight"],
            eps=self.config.rms_norm_eps,
            cos_sin=plan.cos_sin,
            interleaved=self.config.rope_interleave,
            slots=batch.slots,
            cache=pages,
        )

    def _linear(self, ops: Ops, role: str, x: torch.Tensor, out: torch.Tensor, bias: str = "") -> None:
        ops[role].op(self.weights.packed[role], x=x, bias=self.weights.vectors.get(bias), out=out)


def make_step(
    config: MLAConfig, ops: Ops, weights: PackedWeights, views: StepViews, scratch: Workspace
) -> Step:
    """Return the step of one layer, which reads and writes `views` of `scratch`."""
    interleaved, softmax_scale = config.rope_interleave, config.softmax_scale
    rebuild = Rebuild(config, weights, scratch)
    return Step(
        config,
        weights,
        views,
        AbsorbedPath(weights, scratch, views, interleaved, softmax_scale),
        ExpandedPath(
            scratch,
            rebuild,
            config.qk_nope_head_dim,
            interleaved,
            softmax_scale,
            ops["expanded_attention"].op.lse_optional,
        ),
    )
