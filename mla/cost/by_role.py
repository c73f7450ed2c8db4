"""FLOPs and bytes of the parts of one layer step, by their role in `mla.layer.ops`, from the actual lengths.

Over all roles they add up to `mla.cost.step_flops` and `step_bytes`, exactly. What passes from one part to
the next (queries, latent outputs, rebuilt keys) moves no byte here, because a step need not take it to
memory; norms and rotations count nothing at all. Letters as in the design: T tokens, h heads, n, r, c, v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla.config import MLAConfig
from mla.cost import ABSORBED, EXPANDED, PathChooser, attended_pairs, kv_b_parameters


@dataclass(frozen=True)
class Work:
    """What a part of a step needs: FLOPs, a multiply-add being 2, and bytes that must move at least once."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class PathLoad:
    """What the requests that take one attention path bring along."""

    requests: int = 0
    tokens: int = 0  # new ones
    keys: int = 0  # cached tokens attended, new ones included; each once, also where pages are half empty
    pairs: int = 0  # causal query-key pairs


def path_loads(
    config: MLAConfig, query_lens: Sequence[int], kv_lens: Sequence[int], attention: str = "auto"
) -> dict[str, PathLoad]:
    """Return path -> its load; `attention` as in `MLA`."""
    chooser, members = PathChooser(config), {ABSORBED: PathLoad(), EXPANDED: PathLoad()}
    for query_len, kv_len in zip(query_lens, kv_lens, strict=True):
        path = chooser.path(query_len, kv_len) if attention == "auto" else attention
        old, pairs = members[path], attended_pairs(query_len, kv_len)
        members[path] = PathLoad(
            old.requests + 1, old.tokens + query_len, old.keys + kv_len, old.pairs + pairs
        )
    return members


def role_costs(
    config: MLAConfig,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    element_size: int,
    attention: str = "auto",
) -> dict[str, Work]:
    """Return role -> its work in one forward. A role that nobody needs, or that counts nothing, is left out.

    kv_b's weights count once: for W_UK and W_UV if any request is absorbed, else for kv_b_proj.
    """
    loads, tokens = path_loads(config, query_lens, kv_lens, attention), sum(query_lens)
    absorbed, expanded = loads[ABSORBED], loads[EXPANDED]
    costs = {
        "qkv_a_proj": first_projection(config, tokens, element_size),
        "write_latent": Work(bytes=element_size * tokens * config.latent_dim),
        "o_proj": output_projection(config, tokens, element_size),
    }
    if config.q_lora_rank:
        costs["q_b_proj"] = query_expansion(config, tokens, element_size)
    if absorbed.requests:
        costs["w_uk"] = absorption(config, absorbed.tokens, config.qk_nope_head_dim, element_size)
        costs["latent_attention"] = latent_attention(config, absorbed, element_size)
        costs["w_uv"] = absorption(config, absorbed.tokens, config.v_head_dim, element_size)
    if expanded.requests:
        weights = 0 if absorbed.requests else kv_b_parameters(config)
        costs["kv_b_proj"] = expansion(config, expanded.keys, weights, element_size)
        costs["expanded_attention"] = expanded_attention(config, expanded)
    return costs


def first_projection(config: MLAConfig, tokens: int, element_size: int) -> Work:
    """q (or q_a) and kv_a as one product [T, d] x [d, q + c + r]: its weights, and the hidden states read."""
    width = (config.q_lora_rank or config.num_attention_heads * config.qk_head_dim) + config.latent_dim
    weights = config.hidden_size * width
    return Work(2 * tokens * weights, element_size * (weights + tokens * config.hidden_size))


def query_expansion(config: MLAConfig, tokens: int, element_size: int) -> Work:
    """q_b: [T, q_lora_rank] x [q_lora_rank, h (n + r)]."""
    weights = (config.q_lora_rank or 0) * config.num_attention_heads * config.qk_head_dim
    return Work(2 * tokens * weights, element_size * weights)


def absorption(config: MLAConfig, tokens: int, width: int, element_size: int) -> Work:
    """W_UK (width n) or W_UV (width v) of every head, on new tokens: 2 t h c width FLOPs, weights once."""
    weights = config.num_attention_heads * config.kv_lora_rank * width
    return Work(2 * tokens * weights, element_size * weights)


def latent_attention(config: MLAConfig, load: PathLoad, element_size: int) -> Work:
    """Pairs over c + r (scores) and c (values) for every head; each attended latent is read once."""
    per_pair = config.latent_dim + config.kv_lora_rank
    flops = 2 * config.num_attention_heads * load.pairs * per_pair
    return Work(flops, element_size * load.keys * config.latent_dim)


def expansion(config: MLAConfig, keys: int, weights: int, element_size: int) -> Work:
    """kv_b over the context: [keys, c] x [c, h (n + v)]; each attended latent and `weights` are read once."""
    flops = 2 * keys * kv_b_parameters(config)
    return Work(flops, element_size * (weights + keys * config.latent_dim))


def expanded_attention(config: MLAConfig, load: PathLoad) -> Work:
    """Pairs over n + r (scores) and v (values) for every head, on keys and values made just before."""
    return Work(2 * config.num_attention_heads * load.pairs * (config.qk_head_dim + config.v_head_dim))


def output_projection(config: MLAConfig, tokens: int, element_size: int) -> Work:
    """o: [T, h v] x [h v, d]: its weights, and the hidden states written."""
    weights = config.num_attention_heads * config.v_head_dim * config.hidden_size
    return Work(2 * tokens * weights, element_size * (weights + tokens * config.hidden_size))
