"""Published MLA configurations, as far as they differ from their family, and the checkpoint of each.

Which copy of its config.json was read is in `tests/config/data/published_configs.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Preset:
    """What a config.json says of the attention layer beyond the defaults of its family."""

    checkpoint: str  # on the Hugging Face hub
    values: dict[str, Any]

    @property
    def source(self) -> str:
        """The address of the model's own config.json."""
        return f"{_HUB}{self.checkpoint}/blob/main/config.json"


def _yarn(factor: float, mscale: float, beta_fast: float = 32, original: int = 4096) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


def _layer(
    model_type: str, hidden: int, heads: int, q_rank: int | None, kv_rank: int = 512, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        **more,
    }


_V3 = _layer("deepseek_v3", 7168, 128, 1536, rope_scaling=_yarn(40, 1.0))

_GLM5 = _layer("glm_moe_dsa", 6144, 64, 2048, num_hidden_layers=78)

# Divisors of the 16 rotary frequencies of MiniCPM3, for short and long sequences alike.
_FACTORS = [
    1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725, 2.093982484148734,
    3.1446935121267696, 4.937952647693647, 7.524541999994549, 10.475458000005451, 13.062047352306353,
    14.85530648787323, 15.906017515851266, 16.461961959767827, 16.740306425132907, 16.87581087164081,
    16.940876586213285,
]  # fmt: skip
_LONGROPE = {"type": "longrope", "short_factor": _FACTORS, "long_factor": _FACTORS, "attention_factor": 1.0}

PRESETS: dict[str, Preset] = {
    "deepseek-v2-lite": Preset(
        "deepseek-ai/DeepSeek-V2-Lite",
        _layer("deepseek_v2", 2048, 16, None, rope_scaling=_yarn(40, 0.707)),
    ),
    "deepseek-v2": Preset(
        "deepseek-ai/DeepSeek-V2", _layer("deepseek_v2", 5120, 128, 1536, rope_scaling=_yarn(40, 0.707))
    ),
    "deepseek-v3": Preset("deepseek-ai/DeepSeek-V3", _V3),
    "deepseek-v3.1": Preset("deepseek-ai/DeepSeek-V3.1", _V3),
    "deepseek-r1": Preset("deepseek-ai/DeepSeek-R1", _V3),
    "deepseek-v3.2": Preset("deepseek-ai/DeepSeek-V3.2", {**_V3, "model_type": "deepseek_v32"}),
    "kimi-k2": Preset(
        "moonshotai/Kimi-K2-Instruct",
        _layer("kimi_k2", 7168, 64, 1536, rope_theta=50000.0, rope_scaling=_yarn(32.0, 1.0, beta_fast=1)),
    ),
    "kimi-k2.5": Preset(
        "moonshotai/Kimi-K2.5",
        _layer("kimi_k2", 7168, 64, 1536, rope_theta=50000.0, rope_scaling=_yarn(64.0, 1.0)),
    ),
    "glm-4.7-flash": Preset(
        "zai-org/GLM-4.7-Flash", _layer("glm4_moe_lite", 2048, 20, 768, rope_theta=1000000)
    ),
    "glm-5": Preset("zai-org/GLM-5", {**_GLM5, "rope_theta": 1000000}),
    "glm-5.2": Preset(
        "zai-org/GLM-5.2",
        {**_GLM5, "index_topk_freq": 4, "index_skip_topk_offset": 3, "rope_theta": 8000000},
    ),
    "youtu-llm-2b": Preset("tencent/Youtu-LLM-2B", _layer("youtu", 2048, 16, 1536, rope_theta=1600000)),
    "a.x-k1": Preset(
        "skt/A.X-K1",
        _layer(
            "AXK1", 7168, 64, 1536, rope_scaling={**_yarn(4.0, 1.0, original=32768), "mscale_all_dim": 0.0}
        ),
    ),
    "sarvam-105b": Preset(
        "sarvamai/sarvam-105b", _layer("sarvam_mla", 4096, 64, None, rope_scaling=_yarn(40, 1.0))
    ),
    "minicpm3-4b": Preset(
        "openbmb/MiniCPM3-4B", _layer("minicpm3", 2560, 40, 768, 256, rope_scaling=_LONGROPE)
    ),
    "longcat-flash": Preset("meituan-longcat/LongCat-Flash-Chat", _layer("longcat_flash", 6144, 64, 1536)),
    "mistral-small-4": Preset("mistralai/Mistral-Small-4-119B-2603", _layer("mistral4", 4096, 32, 1024, 256)),
    "kimi-linear-48b": Preset(
        "moonshotai/Kimi-Linear-48B-A3B-Instruct", _layer("kimi_linear", 2304, 32, None)
    ),
    "kimi-k3": Preset(
        "moonshotai/Kimi-K3",
        _layer("kimi_k3", 7168, 96, 1536, rms_norm_eps=1e-5, mla_use_output_gate=True),
    ),
    "ling-3-flash": Preset("inclusionAI/Ling-3.0-flash", _layer("bailing_hybrid", 2560, 32, None)),
}

DEFAULT_CONFIG = "deepseek-v2-lite"
