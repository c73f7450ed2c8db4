"""FLOPs and bytes of one layer step, from the actual lengths.

A multiply-add counts as 2 FLOPs. Bytes are those that must move at least once: weights, latents of attended
tokens, new latents, hidden states in and out. Letters as in the design: T tokens, h heads, n, r, c, v.
"""

from __future__ import annotations

from collections.abc import Sequence

from mla.config import MLAConfig
from mla.cost.by_op import attended_pairs

# Attention paths a request can take.
ABSORBED, EXPANDED = "absorbed", "expanded"


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
    """Picks the path with fewer FLOPs per request; the config's part of the sum is computed once."""

    def __init__(self, config: MLAConfig) -> None:
        self._per_pair = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
        self._per_token = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)

    def path(self, query_len: int, kv_len: int) -> str:
        """Return ABSORBED or EXPANDED: the sign of (absorbed - expanded) / 2h, see the functions above."""
        extra = attended_pairs(query_len, kv_len) * self._per_pair + (query_len - kv_len) * self._per_token
        return ABSORBED if extra <= 0 else EXPANDED

    def always_absorbs(self, least: int) -> bool:
        """Return whether single tokens with at least `least` keys take the absorbed path, as in decode."""
        return self._per_pair <= self._per_token and self.path(1, least) == ABSORBED


def projection_parameters(config: MLAConfig) -> int:
    """Return the number of weights in the projections of every new token: q, kv_a and o."""
    q_width = config.num_attention_heads * config.qk_head_dim
    q = config.hidden_size * q_width
    if config.q_lora_rank:
        q = config.q_lora_rank * (config.hidden_size + q_width)
    o = config.num_attention_heads * config.v_head_dim * config.hidden_size
    return q + config.hidden_size * config.latent_dim + o


def kv_b_parameters(config: MLAConfig) -> int:
    """Return the number of weights in kv_b: W_UK and W_UV of all heads."""
    return config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)


def head_parameters(config: MLAConfig) -> int:
    """Return the number of weights that belong to single heads: of q (or q_b), kv_b and o."""
    h, inputs = config.num_attention_heads, config.q_lora_rank or config.hidden_size
    return h * (config.qk_head_dim * inputs + config.v_head_dim * config.hidden_size) + kv_b_parameters(
        config
    )


def parameters(config: MLAConfig) -> int:
    """Return the number of weights in the layer, without norms and biases, which are negligible."""
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
