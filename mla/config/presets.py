"""Published MLA configurations: the checkpoint each belongs to, and the file its numbers are from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Preset:
    """The values of a config.json that concern the attention layer."""

    checkpoint: str  # on the Hugging Face hub
    values: dict[str, Any]
    read_from: str  # the copy of its config.json, or the account of it, that was at hand

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


_GITHUB = "https://github.com/"
_COPIES = f"{_GITHUB}hlky/dinoml_v2/blob/ac464cf1b3a8/agents/plans/transformers/"
_V3_COPY = f"{_COPIES}deepseek_v3/_sources/deepseek-ai__DeepSeek-V3.config.json"
_V3 = _layer("deepseek_v3", 7168, 128, 1536, rope_theta=10000, rope_scaling=_yarn(40, 1.0))

_GLM5 = {
    **_layer("glm_moe_dsa", 6144, 64, 2048, qk_nope_head_dim=192, v_head_dim=256),
    "num_hidden_layers": 78,
    "index_topk": 2048,
    "index_n_heads": 32,
    "index_head_dim": 128,
}

# Divisors of the 16 rotary frequencies of MiniCPM3, for short and long sequences alike.
_MINICPM3_FACTORS = [
    1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725, 2.093982484148734,
    3.1446935121267696, 4.937952647693647, 7.524541999994549, 10.475458000005451, 13.062047352306353,
    14.85530648787323, 15.906017515851266, 16.461961959767827, 16.740306425132907, 16.87581087164081,
    16.940876586213285,
]  # fmt: skip

PRESETS: dict[str, Preset] = {
    "deepseek-v2-lite": Preset(
        "deepseek-ai/DeepSeek-V2-Lite",
        _layer("deepseek_v2", 2048, 16, None, rope_theta=10000, rope_scaling=_yarn(40, 0.707)),
        f"{_COPIES}deepseek_v2/_sources/deepseek-ai__DeepSeek-V2-Lite.config.json",
    ),
    "deepseek-v2": Preset(
        "deepseek-ai/DeepSeek-V2",
        _layer("deepseek_v2", 5120, 128, 1536, rope_theta=10000, rope_scaling=_yarn(40, 0.707)),
        f"{_COPIES}deepseek_v2/_sources/deepseek-ai__DeepSeek-V2.config.json",
    ),
    "deepseek-v3": Preset("deepseek-ai/DeepSeek-V3", _V3, _V3_COPY),
    "deepseek-v3.1": Preset(
        "deepseek-ai/DeepSeek-V3.1",
        _V3,
        f"{_COPIES}deepseek_v3/_sources/deepseek-ai__DeepSeek-V3.1.config.json",
    ),
    "deepseek-r1": Preset(
        "deepseek-ai/DeepSeek-R1",
        _V3,
        f"{_GITHUB}deepseek-ai/DeepSeek-R1/blob/main/README.md (section 3: DeepSeek-V3's architecture)",
    ),
    "deepseek-v3.2": Preset(
        "deepseek-ai/DeepSeek-V3.2",
        {**_V3, "model_type": "deepseek_v32", "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128},
        f"{_GITHUB}deepseek-ai/DeepSeek-V3.2-Exp/blob/3b99a53/inference/config_671B_v3.2.json",
    ),
    "kimi-k2": Preset(
        "moonshotai/Kimi-K2-Instruct",
        _layer("kimi_k2", 7168, 64, 1536, rope_theta=50000.0, rope_scaling=_yarn(32.0, 1.0, beta_fast=1)),
        f"{_GITHUB}AI-Hypercomputer/maxtext/blob/48445cf00e73/src/MaxText/configs/models/kimi-k2-1t.yml",
    ),
    "kimi-k2.5": Preset(
        "moonshotai/Kimi-K2.5",
        _layer("kimi_k2", 7168, 64, 1536, rope_theta=50000.0, rope_scaling=_yarn(64.0, 1.0)),
        f"{_GITHUB}ikawrakow/ik_llama.cpp/issues/1298 (rotary keys) and {_GITHUB}ai-dynamo/aiconfigurator"
        "/blob/821eb9a65145/src/aiconfigurator/model_configs"
        "/moonshotai--Kimi-K2.5_config.json (dimensions)",
    ),
    "glm-4.7-flash": Preset(
        "zai-org/GLM-4.7-Flash",
        _layer(
            "glm4_moe_lite",
            2048,
            20,
            768,
            qk_nope_head_dim=192,
            v_head_dim=256,
            rms_norm_eps=1e-5,
            rope_theta=1000000,
            rope_scaling=None,
            partial_rotary_factor=1.0,
        ),
        f"{_COPIES}glm4_moe_lite/report.md",
    ),
    "glm-5": Preset(
        "zai-org/GLM-5",
        {**_GLM5, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
        f"{_GITHUB}jd-opensource/xllm/blob/a5ffadf5dc65/xllm/models/llm/glm5.h",
    ),
    "glm-5.2": Preset(
        "zai-org/GLM-5.2",
        {
            **_GLM5,
            "index_topk_freq": 4,
            "index_skip_topk_offset": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 8000000},
        },
        f"{_GITHUB}sgl-project/sglang-jax/issues/1383 (rotary keys) and {_GITHUB}huggingface/transformers"
        "/blob/v5.24.0/src/transformers/models/glm_moe_dsa/configuration_glm_moe_dsa.py (dimensions)",
    ),
    "youtu-llm-2b": Preset(
        "tencent/Youtu-LLM-2B",
        _layer("youtu", 2048, 16, 1536, rope_parameters={"rope_type": "default", "rope_theta": 1600000}),
        f"{_COPIES}youtu/report.md",
    ),
    "a.x-k1": Preset(
        "skt/A.X-K1",
        _layer(
            "AXK1",
            7168,
            64,
            1536,
            rope_theta=10000,
            rope_scaling={**_yarn(4.0, 1.0, original=32768), "mscale_all_dim": 0.0},
        ),
        f"{_GITHUB}serithemage/korea-ai-foundation-model-verification/blob"
        "/04562157e35c/docs/03-architecture-analysis.md",
    ),
    "sarvam-105b": Preset(
        "sarvamai/sarvam-105b",
        _layer(
            "sarvam_mla",
            4096,
            64,
            None,
            rope_theta=10000.0,
            rope_scaling={**_yarn(40, 1.0), "type": "deepseek_yarn"},
        ),
        f"{_GITHUB}arnavnagzirkar/vllm/blob/29ad5a40300a/vllm/transformers_utils/configs/sarvam.py",
    ),
    "minicpm3-4b": Preset(
        "openbmb/MiniCPM3-4B",
        _layer(
            "minicpm3",
            2560,
            40,
            768,
            256,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            rms_norm_eps=1e-5,
            max_position_embeddings=32768,
            rope_scaling={
                "type": "longrope",
                "short_factor": _MINICPM3_FACTORS,
                "long_factor": _MINICPM3_FACTORS,
                "original_max_position_embeddings": 32768,
            },
        ),
        f"{_GITHUB}Ascend/MindSpeed-LLM/blob/f0d60bfe12a4"
        "/examples/mcore/minicpm3/pretrain_minicpm3_4b_32k_ptd.sh",
    ),
    "longcat-flash": Preset(
        "meituan-longcat/LongCat-Flash-Chat",
        _layer("longcat_flash", 6144, 64, 1536, rope_theta=10000000.0),
        f"{_COPIES}longcat_flash/report.md",
    ),
    "mistral-small-4": Preset(
        "mistralai/Mistral-Small-4-119B-2603",
        _layer(
            "mistral4",
            4096,
            32,
            1024,
            256,
            qk_nope_head_dim=64,
            v_head_dim=128,
            rope_parameters={
                **_yarn(128.0, 1.0, original=8192),
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
            },
        ),
        f"{_COPIES}mistral4/mistralai_Mistral-Small-4-119B-2603_config.json",
    ),
    "kimi-linear-48b": Preset(
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        _layer("kimi_linear", 2304, 32, None, mla_use_nope=True),
        f"{_HUB}Firworks/Kimi-Linear-48B-A3B-Instruct-nvfp4/resolve/main/config.json",
    ),
    "kimi-k3": Preset(
        "moonshotai/Kimi-K3",
        _layer("kimi_k3", 7168, 96, 1536, rms_norm_eps=1e-5, mla_use_nope=True, mla_use_output_gate=True),
        f"{_GITHUB}AI-Hypercomputer/maxtext/blob/bf801f4474c4/src/maxtext/configs/models/kimi-k3.yml",
    ),
    "ling-3-flash": Preset(
        "inclusionAI/Ling-3.0-flash",
        _layer(
            "bailing_hybrid",
            2560,
            32,
            None,
            rope_theta=6000000,
            gated_attention_proj_granularity_type="head_wise",
        ),
        f"{_GITHUB}AI-Hypercomputer/maxtext/blob/798e9ffd9fa5/src/maxtext/configs/models/ling3-flash-vl.yml"
        f" and {_GITHUB}huggingface/transformers/blob/v5.24.0/src/transformers/models/bailing_hybrid"
        "/configuration_bailing_hybrid.py (the defaults of its keys)",
    ),
}


DEFAULT_CONFIG = "deepseek-v2-lite"
