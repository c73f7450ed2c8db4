"""Problems of `expanded_attention`: ragged segments, strided operands amid NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from float64_attention import attend_segments

from kernel_problems.memory import differences, draw, lse_differences, output, poisoned
from mla_backends.api import AttentionSpec, SegmentLengths
from mla_backends.triton_ops.expanded import ExpandedAttention
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.tuning import Tile, Tuning

Lengths = tuple[int, ...]
SMALL = Tile(16, 16, 1, 1)


@dataclass(frozen=True)
class ExpandedProblem:
    """One call: keys of `nope` + `rope` channels, values of `values`."""

    query_lens: Lengths
    kv_lens: Lengths
    heads: int = 3
    nope: int = 128
    rope: int = 64
    values: int = 128
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16
    tile: Tile = SMALL
    with_lse: bool = True

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.heads,
            kv_lora_rank=512,
            qk_nope_head_dim=self.nope,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.values,
            softmax_scale=(self.nope + self.rope) ** -0.5,
            dtype=self.dtype,
            device=torch.device("cpu"),
        )

    @property
    def op(self) -> ExpandedAttention:
        """Return an op that has not been called."""
        return ExpandedAttention(Launcher(), Tuning(latent={1: self.tile}, expanded={1: self.tile}))

    def wrong(self) -> list[str]:
        """Run the op. Return what is wrong with its outputs."""
        tokens, total, width = sum(self.query_lens), sum(self.kv_lens), self.nope + self.rope
        q = draw(tokens, self.heads, width, dtype=self.dtype, seed=1)
        k = draw(total, self.heads, width, dtype=self.dtype, seed=2)
        v = draw(total, self.heads, self.values, dtype=self.dtype, seed=3)
        out = output(tokens, self.heads, self.values, dtype=self.dtype)
        lse = output(tokens, self.heads, dtype=torch.float32)
        op, scale = self.op, self.spec.softmax_scale
        state = op.prepare(self.spec, SegmentLengths(self.query_lens, self.kv_lens, self.causal))
        op(
            state,
            q=poisoned(q),
            k=poisoned(k),
            v=poisoned(v),
            softmax_scale=scale,
            out=out.part,
            lse=lse.part if self.with_lse else None,
        )
        lengths = ((q, self.query_lens), (k, self.kv_lens), (v, self.kv_lens))
        pieces = zip(*(rows.split(list(counts)) for rows, counts in lengths), strict=True)
        truth, sums = attend_segments(pieces, scale, self.causal)
        return differences(out, truth) + (lse_differences(lse, sums) if self.with_lse else [])
