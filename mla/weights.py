"""Names and shapes of a layer's weights under Hugging Face names, and random ones for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla.config import MLAConfig

SINKS = "sinks"  # logits, in fp32 whatever the dtype of a layer
INDEX_WEIGHTS = "indexer.weights_proj.weight"  # computes in fp32 whatever the dtype of a layer
FP32 = (SINKS, INDEX_WEIGHTS)


def weight_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every weight the layer has."""
    d, h = config.hidden_size, config.num_attention_heads
    q_width, rank = h * config.qk_head_dim, config.q_lora_rank
    shapes: dict[str, tuple[int, ...]] = {}
    if rank is None:
        shapes["q_proj.weight"] = (q_width, d)
    else:
        shapes["q_a_proj.weight"] = (rank, d)
        shapes["q_a_layernorm.weight"] = (rank,)
        shapes["q_b_proj.weight"] = (q_width, rank)
    shapes["kv_a_proj_with_mqa.weight"] = (config.latent_dim, d)
    shapes["kv_a_layernorm.weight"] = (config.kv_lora_rank,)
    kv_b_rows = h * (config.qk_nope_head_dim + config.v_head_dim)
    shapes["kv_b_proj.weight"] = (kv_b_rows, config.kv_lora_rank)
    if config.gate_width:
        shapes["g_proj.weight"] = (config.gate_width, d)
    shapes["o_proj.weight"] = (d, h * config.v_head_dim)
    if config.sink_logits:
        shapes[SINKS] = (h,)
    if config.index_n_heads and rank is not None:
        heads, width = config.index_n_heads, config.index_head_dim
        shapes["indexer.wq_b.weight"] = (heads * width, rank)
        shapes["indexer.wk.weight"] = (width, d)
        shapes["indexer.k_norm.weight"] = shapes["indexer.k_norm.bias"] = (width,)
        shapes[INDEX_WEIGHTS] = (heads, d)
    if config.attention_bias:  # q_proj, q_b_proj and kv_b_proj never have one
        biased = ("kv_a_proj_with_mqa", "o_proj", *(("q_a_proj",) if rank is not None else ()))
        shapes.update({f"{name}.bias": (shapes[f"{name}.weight"][0],) for name in biased})
    return shapes


def random_state_dict(
    config: MLAConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Return host weights N(0, 1 / fan_in), norms 1 + N(0, 0.01), biases N(0, 0.01) and sinks 3 + N(0, 0.01).

    Smaller weights would hide bugs, and larger biases what attention adds to them.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: _random(shape, generator, dtype, middle=float(not name.endswith(".bias")))
        for name, shape in weight_shapes(config).items()
    }
    wide = {name: state[name].float() for name in FP32 if name in state}
    return state | wide | ({SINKS: wide[SINKS] + 2} if config.sink_logits else {})


def _random(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, middle: float
) -> torch.Tensor:
    def normal(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    if len(shape) == 1:
        return (middle + 0.1 * normal(shape)).to(dtype)
    weight = torch.empty(shape, dtype=dtype, device="cpu")
    for rows in weight.split(4096):  # an fp32 copy of a large weight would double peak memory
        rows.copy_(normal(rows.shape) * shape[1] ** -0.5)
    return weight
