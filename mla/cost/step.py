"""FLOPs and bytes of one layer step, and of every op alone, from the actual lengths.

A multiply-add counts as 2 FLOPs. Bytes are those that must move at least once: weights, latents of attended
tokens, new latents, hidden states in and out. Letters as in the design: T tokens, h heads, n, r, c, v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mla.config import MLAConfig

if TYPE_CHECKING:
    from mla_backends.api import AttentionSpec, LinearSpec, NormSpec

#: Attention paths a request can take.
ABSORBED, EXPANDED = "absorbed", "expanded"


def attended_pairs(query_len: int, kv_len: int) -> int:
    """Return the causal query-key pairs: query i of t sees kv_len - t + i + 1 keys."""
    return query_len * (kv_len - query_len) + query_len * (query_len + 1) // 2


def absorbed_flops(config: MLAConfig, query_len: int, kv_len: int) -> int:
    """Return FLOPs of absorbed attention: pairs over c + r and c, plus W_UK and W_UV per new token."""
    c, h = config.kv_lora_rank, config.num_attention_heads
    per_pair = config.latent_dim + c
    per_token = c * (config.qk_nope_head_dim + config.v_head_dim)
    return 2 * h * (attended_pairs(query_len, kv_len) * per_pair + query_len * per_token)


def expanded_flops(config: MLAConfig, query_len: int, kv_len: int) -> int:
    """Return FLOPs of expanded attention: pairs over n + r and v, plus kv_b over the whole context."""
    h, v = config.num_attention_heads, config.v_head_dim
    per_pair = config.qk_head_dim + v
    per_key = config.kv_lora_rank * (config.qk_nope_head_dim + v)
    return 2 * h * (attended_pairs(query_len, kv_len) * per_pair + kv_len * per_key)


class PathChooser:
    """Picks the path with fewer FLOPs per request; the config's part of the sum is done once."""

    def __init__(self, config: MLAConfig) -> None:
        self._per_pair = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
        self._per_token = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)

    def path(self, query_len: int, kv_len: int) -> str:
        """Return ABSORBED or EXPANDED: the sign of (absorbed - expanded) / 2h, see the functions above."""
        extra = attended_pairs(query_len, kv_len) * self._per_pair + (query_len - kv_len) * self._per_token
        return ABSORBED if extra <= 0 else EXPANDED

    def always_absorbs(self, least: int) -> bool:
        """Say whether single tokens after at least `least` keys take the absorbed path, as decode does."""
        return self._per_pair <= self._per_token and self.path(1, least) == ABSORBED


def projection_parameters(config: MLAConfig) -> int:
    """Return the weights every new token passes: q, kv_a and o."""
    q_width = config.num_attention_heads * config.qk_head_dim
    q = config.hidden_size * q_width
    if config.q_lora_rank:
        q = config.q_lora_rank * (config.hidden_size + q_width)
    o = config.num_attention_heads * config.v_head_dim * config.hidden_size
    return q + config.hidden_size * config.latent_dim + o


def kv_b_parameters(config: MLAConfig) -> int:
    """Return the weights of kv_b: W_UK and W_UV of all heads."""
    return config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)


def parameters(config: MLAConfig) -> int:
    """Return all weights of the layer; norms and biases are left out as negligible."""
    return projection_parameters(config) + kv_b_parameters(config)


def step_flops(
    config: MLAConfig, query_lens: Sequence[int], kv_lens: Sequence[int], attention: str = "auto"
) -> int:
    """Return the FLOPs of one forward; `attention` as in `MLA`."""
    count = {ABSORBED: absorbed_flops, EXPANDED: expanded_flops}
    total = 2 * projection_parameters(config) * sum(query_lens)
    chooser = PathChooser(config)
    for query_len, kv_len in zip(query_lens, kv_lens, strict=True):
        path = chooser.path(query_len, kv_len) if attention == "auto" else attention
        total += count[path](config, query_len, kv_len)
    return total


def step_bytes(
    config: MLAConfig, query_lens: Sequence[int], kv_lens: Sequence[int], element_size: int
) -> int:
    """Return the bytes one forward must move: weights once, each attended latent once, hidden in and out."""
    latents = (sum(kv_lens) + sum(query_lens)) * config.latent_dim
    hidden = 2 * sum(query_lens) * config.hidden_size
    return element_size * (parameters(config) + latents + hidden)


# ------------------------------------------------------------------------------------------- one op alone


class Work(NamedTuple):
    """What one call of an op needs: every operand moves once."""

    flops: int
    bytes: int


def linear_cost(spec: LinearSpec, tokens: int) -> Work:
    """Return the work of `linear`, and of `batched_linear`, which has a weight per head."""
    weights = spec.groups * spec.in_features * spec.out_features
    moved = weights + tokens * spec.groups * (spec.in_features + spec.out_features)
    return Work(2 * tokens * weights, spec.dtype.itemsize * moved)


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
    c, h, width = spec.kv_lora_rank, spec.num_heads, spec.kv_lora_rank + spec.qk_rope_head_dim
    tokens = sum(query_lens)
    moved = spec.dtype.itemsize * (tokens * h * (width + c) + sum(kv_lens) * width)
    return Work(2 * h * _pairs(query_lens, kv_lens) * (width + c), moved + 4 * tokens * h)


def expanded_attention_cost(spec: AttentionSpec, query_lens: Sequence[int], kv_lens: Sequence[int]) -> Work:
    """Return the work of `expanded_attention`: keys of n + r and values of v per head; fp32 lse."""
    h, width = spec.num_heads, spec.qk_nope_head_dim + spec.qk_rope_head_dim + spec.v_head_dim
    tokens = sum(query_lens)
    moved = spec.dtype.itemsize * h * width * (tokens + sum(kv_lens))
    return Work(2 * h * _pairs(query_lens, kv_lens) * width, moved + 4 * tokens * h)


def _pairs(query_lens: Sequence[int], kv_lens: Sequence[int]) -> int:
    return sum(map(attended_pairs, query_lens, kv_lens))
