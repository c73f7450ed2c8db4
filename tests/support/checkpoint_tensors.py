"""Sizes, tensors and names of the layers that `checkpoint_maker` writes, and its own way to dequantize."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mla.config import MLAConfig
from mla.weights import weight_shapes

State = dict[str, torch.Tensor]
Values = dict[str, Any]

_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def _dims(hidden: int, heads: int, q_lora: int, kv_lora: int, nope: int, rope: int, value: int) -> Values:
    return {
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "q_lora_rank": q_lora,
        "kv_lora_rank": kv_lora,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "attention_bias": False,
        "rope_theta": 10000,
        "rope_scaling": _YARN,
    }


# Size -> the config's values and the FP8 block. Divided by their scales' rows, ragged 24 and real 576 rows
# would give other blocks than those that are declared.
SIZES: dict[str, tuple[Values, list[int]]] = {
    "tiny": (_dims(64, 4, 32, 32, 16, 16, 16), [16, 16]),
    "ragged": (_dims(72, 3, 24, 40, 20, 10, 12), [16, 20]),
    "real": (_dims(7168, 128, 1536, 512, 128, 64, 128), [128, 128]),
}
LAYER = "model.layers.3.self_attn."
OWN_NAMES = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}


def values_of(size: str, **changes: Any) -> Values:
    """Return a size's config values with some replaced."""
    return {**SIZES[size][0], **changes}


def _draw(
    shape: tuple[int, ...], generator: torch.Generator, scale: float, dtype: torch.dtype, shift: float = 0
) -> torch.Tensor:
    """Return shift + N(0, scale^2). Large tensors repeat a pattern of prime length: drawing takes long."""
    count = math.prod(shape)
    pattern = torch.randn(min(count, 1_000_003), generator=generator).mul_(scale).add_(shift)
    pattern = pattern.clamp_(-448, 448).to(dtype)
    return pattern.repeat(-(-count // len(pattern)))[:count].view(shape)


def plain(values: Values, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> State:
    """Return a layer's weights under Hugging Face names: N(0, 1 / fan_in), norms and biases near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in weight_shapes(MLAConfig.from_dict(values)).items():
        matrix = len(shape) == 2
        scale, shift = (shape[1] ** -0.5, 0) if matrix else (0.1, 1)
        state[name] = _draw(shape, generator, scale, dtype, shift)
    return state


def fp8(state: State, block: Sequence[int], seed: int = 0, keep: Iterable[str] = ()) -> State:
    """Return a layer with FP8 matrices and a `weight_scale_inv` each, all but those in `keep`."""
    generator = torch.Generator().manual_seed(seed)
    quantized: State = {}
    for name, weight in state.items():
        quantized[name] = weight
        if weight.dim() == 2 and name not in keep:
            grid = [-(-n // b) for n, b in zip(weight.shape, block, strict=True)]
            scale = torch.rand(grid, generator=generator) + 0.5
            quantized[name] = _draw(tuple(weight.shape), generator, 120, torch.float8_e4m3fn)
            quantized[name + "_scale_inv"] = scale / 120 / weight.shape[1] ** 0.5
    return quantized


def dequantized(state: State, block: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> State:
    """Return plain weights, block after block: each element in fp32 times its block's scale, then rounded."""
    result = {}
    for name, weight in state.items():
        scale = state.get(name + "_scale_inv")
        if scale is not None:
            weight = _dequantize(weight, scale, block).to(dtype)
        if not name.endswith("_scale_inv"):
            result[name] = weight
    return result


def _dequantize(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    wide = weight.float()
    for i, rows in enumerate(wide.split(block[0], 0)):
        for j, part in enumerate(rows.split(block[1], 1)):
            part.mul_(scale[i, j])
    return wide


def named(state: State, prefix: str) -> State:
    """Return the weights as `prefix` plus their Hugging Face names."""
    return {prefix + name: weight for name, weight in state.items()}


def deepseek_names(state: State, prefix: str = "layers.3.attn.") -> State:
    """Return the weights under DeepSeek's own names, scales as `.scale`."""
    renamed = {}
    for name, weight in state.items():
        module, _, rest = name.partition(".")  # an indexer's names are the same
        rest = rest.replace("weight_scale_inv", "scale")
        renamed[f"{prefix}{OWN_NAMES.get(module, module)}.{rest}"] = weight
    return renamed


def neighbours(layer: str = "model.layers.3.") -> State:
    """Return tensors that whole layers and models have beside the attention."""
    names = ("mlp.gate.weight", "input_layernorm.weight", "self_attn.rotary_emb.inv_freq")
    return {layer + name: torch.full((2, 3), torch.nan) for name in names} | {
        "model.embed_tokens.weight": torch.full((4,), torch.nan),
        "lm_head.weight": torch.full((4,), torch.nan),
    }
