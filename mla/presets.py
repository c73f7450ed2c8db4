"""Published MLA configurations, each with the place its numbers were read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """The config.json values that concern the attention layer, and their source."""

    values: dict[str, Any]
    source: str


def _yarn(factor: float, mscale: float, **betas: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        **betas,
    }


_V3 = {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "rope_scaling": _yarn(40, 1.0),
}

PRESETS: dict[str, Preset] = {
    "deepseek-v2-lite": Preset(
        {
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "rope_scaling": _yarn(40, 0.707),
        },
        "https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json",
    ),
    "deepseek-v2": Preset(
        {
            "hidden_size": 5120,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "rope_scaling": _yarn(40, 0.707),
        },
        "https://huggingface.co/deepseek-ai/DeepSeek-V2/blob/main/config.json",
    ),
    "deepseek-v3": Preset(_V3, "https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json"),
    "deepseek-r1": Preset(_V3, "https://huggingface.co/deepseek-ai/DeepSeek-R1/blob/main/config.json"),
    "kimi-k2": Preset(
        {
            "hidden_size": 7168,
            "num_attention_heads": 64,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "rope_theta": 50000.0,
            "rope_scaling": _yarn(32, 1.0, beta_fast=1.0, beta_slow=1.0),
        },
        "https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/config.json",
    ),
}
