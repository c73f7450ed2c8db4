"""A tiny random model of every family that `use_mla` serves, with the same weights every time."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers_peer import REFUSAL

if REFUSAL:  # leaves out the file that imports this
    pytest.skip(REFUSAL, allow_module_level=True)
# What a cache is called: in older releases otherwise.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"
VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {
    **COMMON,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
# Of an indexer whose scores hardly tie: all heads score few keys 0.
INDEXER = {"index_topk": 12, "index_n_heads": 16, "index_head_dim": 16}
# Module of the model, its prefix, and its config.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", "DeepseekV2", {**PLAIN, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3", {**PLAIN, "rope_parameters": YARN}),
    "deepseek_v3 with biases": ("deepseek_v3", "DeepseekV3", {**PLAIN, "attention_bias": True}),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32", {**PLAIN, **INDEXER}),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        "GlmMoeDsa",
        {**PLAIN, **INDEXER, "num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLite", PLAIN),
    "youtu": ("youtu", "Youtu", PLAIN),
    "axk1": ("axk1", "AXK1", PLAIN),
    "minicpm3": ("minicpm3", "MiniCPM3", {**PLAIN, "scale_emb": 1}),
    "mistral4": ("mistral4", "Mistral4", {**PLAIN, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}),
    "kimi_linear": (
        "kimi_linear",
        "KimiLinear",
        {
            **PLAIN,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
            "linear_attn_config": {"head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4},
        },
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        "BailingHybrid",
        {
            **PLAIN,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        "LongcatFlash",
        {
            **COMMON,
            "head_dim": 8,
            "num_layers": 1,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
        },
    ),
}


def make_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a model of a family, with changes of its config."""
    module, prefix, values = FAMILIES[family]
    home = f"transformers.models.{module}"
    config_class = getattr(importlib.import_module(f"{home}.configuration_{module}"), f"{prefix}Config")
    model_class = getattr(importlib.import_module(f"{home}.modeling_{module}"), f"{prefix}ForCausalLM")
    torch.manual_seed(0)
    return fill(model_class(config_class(**{**values, **changes})).to(dtype))


def fill(model: Any) -> Any:
    """Draw weights that are large enough that tokens do not repeat; return the model."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2 / weight.shape[-1] ** 0.5)
    return model.eval()
