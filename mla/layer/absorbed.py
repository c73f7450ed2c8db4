"""The absorbed path: W_UK moves to the query and W_UV to the result, and all heads attend the latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import AbsorbedGroup
from mla.layer.views import Projected, StepViews
from mla.layer.workspace import Workspace


@dataclass(frozen=True, eq=False)
class AbsorbedPath:
    """What a step does with the requests that are cheaper absorbed."""

    weights: PackedWeights
    scratch: Workspace
    views: StepViews
    interleaved: bool
    softmax_scale: float

    def run(self, ops: Ops, projected: Projected, group: AbsorbedGroup, pages: torch.Tensor) -> None:
        """Attend with q_nope W_UK, joined with the rotated q_pe, over the latents; then apply W_UV.

        Takes `projected.q` not yet rotated and `pages` [pages, page, c + r]; writes the group's rows of
        `projected.heads`.
        """
        views, packed = self.views.absorbed(projected, group.tokens), self.weights.packed
        ops["w_uk"].op(packed["w_uk"], x=views.q_nope, out=views.latent_nope)
        ops["rotate_query"].op(
            x=views.q_pe, cos_sin=group.cos_sin, interleaved=self.interleaved, out=views.latent_pe
        )
        ops["latent_attention"].op(
            group.state,
            q=views.latent_q,
            cache=pages,
            block_table=group.batch.block_table,
            kv_lens=group.batch.kv_lens_device,
            cu_q=group.batch.cu_q,
            softmax_scale=self.softmax_scale,
            out=views.latent_out,
            lse=views.lse,
        )
        ops["w_uv"].op(packed["w_uv"], x=views.latent_out, out=views.heads)
        self.scratch.put(projected.heads, group.tokens, views.heads)
