"""Attention problems: lengths and widths, inputs drawn from a seed, and the truth in float64.

A problem's host side (inputs, truth, the reference's own output) is made once and shared by every op, dtype
by dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla.verify.op_oracle import attend
from mla_backends.api import AttentionSpec

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Dims:
    """Widths of one head and of the latent."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def latent(self) -> int:
        """Width of a cached row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def key(self) -> int:
        """Width of an expanded key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """The usual softmax scale."""
        return float(self.key**-0.5)


DEEPSEEK = Dims(512, 64, 128, 128)  # what every model of the family has, and every kernel is made for
SMALL = Dims(32, 8, 16, 12)


def attention_spec(
    heads: int, dims: Dims, scale: float, dtype: torch.dtype, device: torch.device
) -> AttentionSpec:
    """Return the contract's description of a layer's attention."""
    return AttentionSpec(
        num_heads=heads,
        kv_lora_rank=dims.kv_lora_rank,
        qk_nope_head_dim=dims.qk_nope_head_dim,
        qk_rope_head_dim=dims.qk_rope_head_dim,
        v_head_dim=dims.v_head_dim,
        softmax_scale=scale,
        dtype=dtype,
        device=device,
    )


@dataclass(frozen=True)
class AttentionProblem:
    """One attention call. `absorbed` is `latent_attention`, otherwise it is `expanded_attention`.

    `magnitude` scales the queries, and with them the logits, whose standard deviation is about 1.7 at 1.
    """

    absorbed: bool
    query_lens: Lengths
    kv_lens: Lengths
    heads: int = 16
    page_size: int = 64  # absorbed only
    causal: bool = True  # absorbed attention always is
    dims: Dims = DEEPSEEK
    scale_factor: float = 1.0
    magnitude: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.dims.scale * self.scale_factor

    @property
    def label(self) -> str:
        """What is special about the problem, for reports."""
        words = [f"q {_runs(self.query_lens)} kv {_runs(self.kv_lens)}", f"heads {self.heads}"]
        words += [f"page {self.page_size}"] * self.absorbed
        words += ["no mask"] * (not self.causal)
        words += [f"latent {self.dims.kv_lora_rank}"] * (self.dims != DEEPSEEK)
        return " ".join(words)

    def spec(self, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        return attention_spec(self.heads, self.dims, self.scale, dtype, device)


def _runs(lengths: Lengths) -> str:
    """Return lengths with repeats shortened: 1x6,5."""
    groups = ((length, len(list(run))) for length, run in itertools.groupby(lengths))
    return ",".join(f"{length}x{count}" if count > 1 else str(length) for length, count in groups)


@dataclass(frozen=True)
class AttentionData:
    """The host's side of a problem. Absorbed: keys are latent rows and values their first columns."""

    q: torch.Tensor  # [T, h, dk]
    keys: tuple[torch.Tensor, ...]  # per request [s, 1 or h, dk]
    values: tuple[torch.Tensor, ...]  # per request [s, 1 or h, dv]
    out: torch.Tensor  # [T, h, dv] float64
    lse: torch.Tensor  # [T, h] float64


@functools.lru_cache(maxsize=96)
def data(problem: AttentionProblem, dtype: torch.dtype) -> AttentionData:
    """Draw N(0, 1) inputs in `dtype` and attend them in float64."""
    generator = torch.Generator().manual_seed(problem.seed)
    dims, heads = problem.dims, problem.heads

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens = sum(problem.query_lens)
    if problem.absorbed:
        q = draw(tokens, heads, dims.latent)
        keys = tuple(draw(length, 1, dims.latent) for length in problem.kv_lens)
        values = tuple(rows[..., : dims.kv_lora_rank] for rows in keys)
    else:
        q = draw(tokens, heads, dims.key)
        keys = tuple(draw(length, heads, dims.key) for length in problem.kv_lens)
        values = tuple(draw(length, heads, dims.v_head_dim) for length in problem.kv_lens)
    q = q * problem.magnitude
    parts = zip(q.split(list(problem.query_lens)), keys, values, strict=True)
    out, lse = zip(*(attend(*part, problem.scale, problem.causal) for part in parts), strict=True)
    return AttentionData(q, keys, values, torch.cat(out), torch.cat(lse))


def cumulative(lengths: Sequence[int]) -> list[int]:
    """Return where each request starts, and the end of the last."""
    return [0, *itertools.accumulate(lengths)]
