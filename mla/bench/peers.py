"""`transformers` as a comparator: its DeepSeek-V3 attention, one request at a time.

Position embeddings and masks are made outside the timed region, as a model makes them once per forward.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import torch

from mla.bench.implementations import Implementation, Setting
from mla.bench.inputs import Inputs
from mla.bench.workload import Scenario
from mla.config import MLAConfig
from mla.errors import MLAError
from mla.oracle import State


class PeerError(MLAError):
    """A comparator that cannot run here."""


class Transformers(Implementation):
    """`DeepseekV3Attention` with attention function "sdpa" or "eager"."""

    def __init__(self, setting: Setting, state: State, kind: str = "sdpa") -> None:
        super().__init__(setting)
        self.name = "transformers" if kind == "sdpa" else f"transformers-{kind}"
        self._kind = kind
        self._modules = _import()
        self._config = _peer_config(self._modules, setting.config, kind)
        with torch.device(setting.device):
            self._layer = self._modules.DeepseekV3Attention(self._config, 0).to(setting.dtype).eval()
            self._rotary = self._modules.DeepseekV3RotaryEmbedding(self._config)
        self._layer.load_state_dict({key: tensor.to(setting.dtype) for key, tensor in state.items()})
        self._layer.requires_grad_(False)

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self._scenario = scenario
        self._prepare_buffers(inputs)
        device, dtype = self.setting.device, self.setting.dtype
        self._history = [
            (
                kv.to(device, dtype)[None, None],
                _peer_channels(self.setting.config, pe).to(device, dtype)[None, None],
            )
            for kv, pe in inputs.history
        ]
        self._steps = [self._arguments(step) for step in range(scenario.inputs)]
        self.restore()

    def _arguments(self, step: int) -> list[tuple[Any, Any]]:
        """Return, per request, the rotary embedding and the mask of one step."""
        arguments = []
        for query_len, kv_len in zip(self._scenario.query_lens, self._scenario.kv_lens(step), strict=True):
            positions = torch.arange(kv_len - query_len, kv_len, device=self.setting.device)[None]
            embedding = self._rotary(self._hidden[:1], positions)
            arguments.append((embedding, self._mask(query_len, kv_len)))
        return arguments

    def _mask(self, query_len: int, kv_len: int) -> torch.Tensor | None:
        if query_len == 1:
            return None
        device = self.setting.device
        visible = torch.ones(query_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - query_len)
        if self._kind == "sdpa":
            return visible[None, None]
        least = torch.finfo(self.setting.dtype).min
        mask = torch.zeros(query_len, kv_len, dtype=self.setting.dtype, device=device)
        return mask.masked_fill_(~visible, least)[None, None]

    def restore(self) -> None:
        self._caches = []
        for kv, pe in self._history:
            cache = self._modules.DynamicCache()
            if kv.shape[2]:
                cache.update(kv, pe, 0)
            self._caches.append(cache)

    def before(self, index: int) -> None:
        if self._scenario.mode == "prefill":
            self.restore()  # its cache would grow with every forward

    @torch.no_grad()
    def step(self, index: int) -> None:
        step = index if self._scenario.mode == "decode" else 0
        rows = self._hidden[step].split(self._scenario.query_lens)
        outputs = self.outputs[step].split(self._scenario.query_lens)
        requests = zip(rows, outputs, self._caches, self._steps[step], strict=True)
        for hidden, out, cache, (embedding, mask) in requests:
            result = self._layer(
                hidden[None], position_embeddings=embedding, attention_mask=mask, cache=cache
            )
            out.copy_(result[0][0])

    def cache_bytes(self) -> int:
        tokens = sum(self._scenario.final_lens)
        return tokens * self.setting.config.latent_dim * self.setting.dtype.itemsize

    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._layer.parameters())


class _Modules:
    """The parts of `transformers` in use."""

    def __init__(self) -> None:
        from transformers import DeepseekV3Config, DynamicCache
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

        self.DeepseekV3Config, self.DynamicCache = DeepseekV3Config, DynamicCache
        self.DeepseekV3Attention = modeling.DeepseekV3Attention
        self.DeepseekV3RotaryEmbedding = modeling.DeepseekV3RotaryEmbedding


def require() -> None:
    """Raise `PeerError` where `transformers` is missing."""
    _import()


def _import() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Modules()
    except ImportError as error:
        raise PeerError(
            "implementation 'transformers' needs transformers >= 5.20: pip install '.[transformers]' "
            f"({error})."
        ) from error


def _peer_config(modules: Any, config: MLAConfig, kind: str) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        rope |= {"rope_type": "yarn", **{key: value for key, value in scaling.items() if value is not None}}
    peer = modules.DeepseekV3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        attention_bias=config.attention_bias,
        rms_norm_eps=config.rms_norm_eps,
        rope_interleave=config.rope_interleave,
        rope_parameters=rope,
        max_position_embeddings=163840,
    )
    peer._attn_implementation = kind
    return peer


def _peer_channels(config: MLAConfig, pe: torch.Tensor) -> torch.Tensor:
    """Return cached rotary keys in transformers' order: even channels, then odd ones."""
    return torch.cat((pe[..., 0::2], pe[..., 1::2]), dim=-1) if config.rope_interleave else pe
