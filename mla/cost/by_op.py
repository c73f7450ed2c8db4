"""Work of one call of each op of the contract, from actual lengths: every operand moves once.

Letters as in the design: T tokens, h heads, n, r, c, v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mla.cost.work import Work

if TYPE_CHECKING:
    from mla_backends.api import AttentionSpec, LinearSpec, NormSpec


def attended_pairs(query_len: int, kv_len: int) -> int:
    """Return the causal query-key pairs: query i of t sees kv_len - t + i + 1 keys."""
    return query_len * (kv_len - query_len) + query_len * (query_len + 1) // 2


def linear_flops(weights: int, rows: int) -> int:
    """Return the FLOPs of multiplying `rows` rows by a matrix of `weights` elements."""
    return 2 * rows * weights


def latent_attention_flops(heads: int, pairs: int, c: int, r: int) -> int:
    """Return the FLOPs of scores over c + r and values of c, for every query-key pair of every head."""
    return 2 * heads * pairs * (2 * c + r)


def expanded_attention_flops(heads: int, pairs: int, qk_head_dim: int, v: int) -> int:
    """Return the FLOPs of scores over n + r and values of v, for every query-key pair of every head."""
    return 2 * heads * pairs * (qk_head_dim + v)


def linear_cost(spec: LinearSpec, tokens: int) -> Work:
    """Return the work of `linear`, and of `batched_linear`, which has a weight per head."""
    weights = spec.groups * spec.in_features * spec.out_features
    moved = weights + tokens * spec.groups * (spec.in_features + spec.out_features)
    return Work(linear_flops(weights, tokens), spec.dtype.itemsize * moved)


def rms_norm_cost(spec: NormSpec, tokens: int) -> Work:
    """Return the work of `rms_norm`: square and add, then scale and weigh."""
    return Work(4 * tokens * spec.features, spec.dtype.itemsize * (2 * tokens + 1) * spec.features)


def rotate_query_cost(spec: AttentionSpec, tokens: int) -> Work:
    """Return the work of `rotate_query`: 6 FLOPs per pair of channels, and fp32 angles per token."""
    channels, angles = tokens * spec.num_heads * spec.qk_rope_head_dim, tokens * spec.qk_rope_head_dim
    return Work(3 * channels, 2 * spec.dtype.itemsize * channels + 4 * angles)


def write_latent_cost(spec: AttentionSpec, tokens: int) -> Work:
    """Return the work of `write_latent`: norm c channels, rotate r, with fp32 angles and int64 slots."""
    c, r = spec.kv_lora_rank, spec.qk_rope_head_dim
    moved = spec.dtype.itemsize * (2 * tokens * (c + r) + c) + tokens * (4 * r + 8)
    return Work(tokens * (4 * c + 3 * r), moved)


def latent_attention_cost(spec: AttentionSpec, query_lens: Sequence[int], kv_lens: Sequence[int]) -> Work:
    """Return the work of `latent_attention`: one key of c + r and one value of c for all heads; fp32 lse."""
    c, r, h, tokens = spec.kv_lora_rank, spec.qk_rope_head_dim, spec.num_heads, sum(query_lens)
    moved = spec.dtype.itemsize * (tokens * h * (2 * c + r) + sum(kv_lens) * (c + r))
    flops = latent_attention_flops(h, _pairs(query_lens, kv_lens), c, r)
    return Work(flops, moved + 4 * tokens * h)


def expanded_attention_cost(spec: AttentionSpec, query_lens: Sequence[int], kv_lens: Sequence[int]) -> Work:
    """Return the work of `expanded_attention`: keys of n + r and values of v per head; fp32 lse."""
    h, v, tokens = spec.num_heads, spec.v_head_dim, sum(query_lens)
    qk_head_dim = spec.qk_nope_head_dim + spec.qk_rope_head_dim
    moved = spec.dtype.itemsize * h * (qk_head_dim + v) * (tokens + sum(kv_lens))
    flops = expanded_attention_flops(h, _pairs(query_lens, kv_lens), qk_head_dim, v)
    return Work(flops, moved + 4 * tokens * h)


def _pairs(query_lens: Sequence[int], kv_lens: Sequence[int]) -> int:
    return sum(map(attended_pairs, query_lens, kv_lens))
