"""The layer against `transformers`' DeepseekV3Attention with the same weights and the same cached latents.

transformers caches the rotary part de-interleaved (evens, then odds) under interleaved rope.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers_peer import DeepseekV3Attention, DeepseekV3Config, DeepseekV3RotaryEmbedding

from mla import MLAConfig
from mla.config import YarnScaling
from mla.layer.rope import inverse_frequencies

YARN = {"original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 0.707}


def twin_config(config: MLAConfig) -> DeepseekV3Config:
    """Return the transformers config of the same layer."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        keys = (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        )
        values = {key: getattr(config.rope_scaling, key) for key in keys}
        rope.update({key: value for key, value in values.items() if value is not None}, rope_type="yarn")
    names = ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")
    names = (*names, "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "attention_bias", "rope_interleave")
    return DeepseekV3Config(
        **{name: getattr(config, name) for name in names},
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=rope,
        max_position_embeddings=163840,
        attn_implementation="eager",
    )


class Twin:
    """One layer of transformers, run request by request."""

    def __init__(self, config: MLAConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.config, twin = config, twin_config(config)
        self.attention = DeepseekV3Attention(twin, 0).to(dtype).eval()
        self.attention.load_state_dict(state)
        self.rotary = DeepseekV3RotaryEmbedding(twin)

    @torch.no_grad()
    def run(self, hidden: torch.Tensor, kv: torch.Tensor, pe: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the output [t, d], and kv [s, c] and pe [s, r] as cached afterwards, in checkpoint order."""
        cache, (new, past) = DynamicCache(), (len(hidden), len(kv))
        if self.config.rope_interleave:
            pe = torch.cat((pe[:, 0::2], pe[:, 1::2]), dim=1)
        if past:
            cache.update(kv[None, None], pe[None, None], 0)
        position = torch.arange(past, past + new)[None]
        future = torch.arange(past + new) > position[0, :, None]
        mask = torch.zeros(new, past + new, dtype=hidden.dtype)
        mask = mask.masked_fill(future, torch.finfo(hidden.dtype).min)[None, None]
        out = self.attention(hidden[None], self.rotary(hidden[None], position), mask, cache=cache)[0][0]
        kv, pe = cache.layers[0].keys[0, 0], cache.layers[0].values[0, 0]
        if self.config.rope_interleave:
            pe = torch.stack(pe.chunk(2, dim=1), dim=-1).flatten(1)
        return out, kv, pe


def compare(case: Any, dtype: torch.dtype, bound: float, latent_bound: float) -> None:
    """Compare outputs over all tokens, and every cached latent, of each request."""
    twin = Twin(case.config, case.state, dtype)
    outs = case.run().split(list(case.batch.query_lens))
    inputs = case.hidden.split(list(case.batch.query_lens))
    for sequence, out, hidden, past in zip(case.ids, outs, inputs, case.history, strict=True):
        expected = twin.run(hidden, *past)
        for actual, other, limit in zip(
            (out, *case.cache.read(sequence)), expected, (bound, latent_bound, latent_bound), strict=True
        ):
            error = (actual.double() - other.double()).norm() / other.double().norm()
            assert error <= limit


@pytest.mark.parametrize("rank", [None, 24])
@pytest.mark.parametrize("scaling", [None, YarnScaling(40, **YARN)])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_fp32_agrees(
    make_case: Any, tiny: Any, rank: int | None, scaling: Any, interleave: bool, attention: str
) -> None:
    config = tiny(q_lora_rank=rank, rope_scaling=scaling, rope_interleave=interleave)
    case = make_case([20, 1, 6], [0, 90, 33], config, attention=attention)
    compare(case, torch.float32, 1e-5, 1e-6)


@pytest.mark.parametrize("rank", [None, 24])
@pytest.mark.parametrize("scaling", [None, YarnScaling(40, **YARN)])
def test_bf16_agrees_within_what_two_right_implementations_differ(
    make_case: Any, tiny: Any, rank: int | None, scaling: Any
) -> None:
    config = tiny(q_lora_rank=rank, rope_scaling=scaling)
    compare(make_case([20, 1, 6], [0, 90, 33], config, dtype=torch.bfloat16), torch.bfloat16, 3e-2, 6e-3)


@pytest.mark.parametrize("rank", [None, 24])
def test_biases_agree(make_case: Any, tiny: Any, rank: int | None) -> None:
    config = tiny(q_lora_rank=rank, attention_bias=True)
    compare(make_case([20, 1, 6], [0, 90, 33], config), torch.float32, 1e-5, 1e-6)


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize(("history", "bound"), [(4095, 1e-5), (5000, 1e-5), (20000, 2e-5)])
def test_positions_past_the_original_context_agree(
    make_case: Any, tiny: Any, attention: str, history: int, bound: float
) -> None:
    scaling = YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0)
    config = tiny(rope_scaling=scaling, num_attention_heads=2, qk_rope_head_dim=16)
    case = make_case([3], [history], config, attention=attention, page_size=64)
    compare(case, torch.float32, bound, 1e-5)


SCALINGS = [
    None,
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707},
    {"factor": 40, "original_max_position_embeddings": 4096},
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0},
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0},
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0},
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"factor": 32, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0},
    {"factor": 1.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"factor": 4.5, "original_max_position_embeddings": 32768, "beta_fast": 64, "beta_slow": 2},
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 50000.0])
@pytest.mark.parametrize("width", [8, 64])
def test_frequencies_magnitude_and_scale_agree(tiny: Any, scaling: Any, theta: float, width: int) -> None:
    config = tiny(
        rope_theta=theta, qk_rope_head_dim=width, rope_scaling=YarnScaling(**scaling) if scaling else None
    )
    twin = twin_config(config)
    rotary = DeepseekV3RotaryEmbedding(twin)
    ours, theirs = inverse_frequencies(config), rotary.inv_freq
    one_ulp = torch.nextafter(theirs, torch.full_like(theirs, torch.inf)) - theirs
    assert ((ours - theirs).abs() <= one_ulp).all()
    magnitude = config.rope_scaling.magnitude() if config.rope_scaling else 1.0
    assert magnitude == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert config.softmax_scale == pytest.approx(DeepseekV3Attention(twin, 0).scaling, rel=1e-12)
