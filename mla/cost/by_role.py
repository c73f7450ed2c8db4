"""FLOPs and bytes of the parts of one layer step, by their role in `mla.layer.ops`, from the actual lengths.

Over all roles they add up to `mla.cost.step_flops` and `step_bytes`, exactly. FLOPs are those of the op
alone (`by_op`). Bytes are fewer: what passes from one part to the next (queries, latent outputs, rebuilt
keys) moves none here, because a step need not take it to memory. Norms and rotations count nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla.config import MLAConfig
from mla.cost.by_op import (
    attended_pairs,
    expanded_attention_flops,
    latent_attention_flops,
    linear_flops,
)
from mla.cost.step import ABSORBED, EXPANDED, PathChooser, kv_b_parameters
from mla.cost.work import Work


@dataclass(frozen=True)
class PathLoad:
    """The requests that take one attention path, added up."""

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
    """Return role -> its work in one forward, without the roles that do not run or count nothing.

    kv_b's weights count once: for W_UK and W_UV if any request is absorbed, else for kv_b_proj.
    """
    loads, tokens = path_loads(config, query_lens, kv_lens, attention), sum(query_lens)
    costs = _projections(config, tokens, element_size)
    costs["write_latent"] = Work(bytes=element_size * tokens * config.latent_dim)
    if loads[ABSORBED].requests:
        costs.update(_absorbed(config, loads[ABSORBED], element_size))
    if loads[EXPANDED].requests:
        weights = 0 if loads[ABSORBED].requests else kv_b_parameters(config)
        costs.update(_expanded(config, loads[EXPANDED], weights, element_size))
    return costs


def _projections(config: MLAConfig, tokens: int, element_size: int) -> dict[str, Work]:
    """Projections of all new tokens; hidden states are read by the first and written by the last."""
    d, q_width = config.hidden_size, config.num_attention_heads * config.qk_head_dim
    first = d * ((config.q_lora_rank or q_width) + config.latent_dim)  # q (or q_a) and kv_a as one weight
    last = config.num_attention_heads * config.v_head_dim * d
    costs = {
        "qkv_a_proj": _product(first, tokens, element_size, moved=tokens * d),
        "o_proj": _product(last, tokens, element_size, moved=tokens * d),
    }
    if config.q_lora_rank:
        costs["q_b_proj"] = _product(config.q_lora_rank * q_width, tokens, element_size)
    return costs


def _absorbed(config: MLAConfig, load: PathLoad, element_size: int) -> dict[str, Work]:
    """W_UK and W_UV of every head on new tokens; each attended latent is read once."""
    h, c = config.num_attention_heads, config.kv_lora_rank
    flops = latent_attention_flops(h, load.pairs, c, config.qk_rope_head_dim)
    return {
        "w_uk": _product(h * c * config.qk_nope_head_dim, load.tokens, element_size),
        "latent_attention": Work(flops, element_size * load.keys * config.latent_dim),
        "w_uv": _product(h * c * config.v_head_dim, load.tokens, element_size),
    }


def _expanded(config: MLAConfig, load: PathLoad, weights: int, element_size: int) -> dict[str, Work]:
    """kv_b over the context, reading each latent and `weights` once; its keys and values move no byte."""
    expansion = linear_flops(kv_b_parameters(config), load.keys)
    attention = expanded_attention_flops(
        config.num_attention_heads, load.pairs, config.qk_head_dim, config.v_head_dim
    )
    return {
        "kv_b_proj": Work(expansion, element_size * (weights + load.keys * config.latent_dim)),
        "expanded_attention": Work(attention),
    }


def _product(weights: int, rows: int, element_size: int, moved: int = 0) -> Work:
    """A product with weights that are read once; `moved` counts the other elements it moves."""
    return Work(linear_flops(weights, rows), element_size * (weights + moved))
