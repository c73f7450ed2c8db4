"""The attention layer of `transformers` for the model's family, run one request at a time.

Position embeddings and masks are computed outside the timed region, since a model computes them once per
forward for all layers. The class that computes a config is chosen here, and the channel order of its cache.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mla.bench.subjects.base import Facts, LayerImplementation
from mla.bench.subjects.inputs import Inputs, Turn
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.config import DIMENSIONS, LongRopeScaling, MLAConfig, QueryScaling, YarnScaling
from mla.errors import MLAError
from mla.integrations import require_transformers
from mla.verify.layer_oracle import State
from mla_backends.errors import first_line


class TransformersMissing(MLAError):
    """`transformers` is not installed, too old, broken, or refuses this torch."""


class TransformersLayer(LayerImplementation):
    """The family's attention class with attention function "sdpa" or "eager"."""

    def __init__(self, setting: Setting, state: State, kind: str = "sdpa") -> None:
        super().__init__(setting)
        self.name = "transformers" if kind == "sdpa" else f"transformers-{kind}"
        self._kind = kind
        self._make_cache = require()
        self._model = transformers_model(setting.config, kind)
        with torch.device(setting.device):
            self._layer = self._model.attention().to(setting.dtype).eval()
            self._rotary = self._model.rotary()
        self._layer.load_state_dict({key: tensor.to(setting.dtype) for key, tensor in state.items()})
        self._layer.requires_grad_(False)

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.prepare_buffers(scenario, inputs)
        device, dtype = self.setting.device, self.setting.dtype
        cached = ((kv, self._model.to_cache(pe)) for kv, pe in inputs.history)
        self._history = [tuple(part.to(device, dtype)[None, None] for part in pair) for pair in cached]
        self._steps = [self._arguments(step) for step in range(scenario.inputs)]
        self.restore()

    def _arguments(self, step: int) -> list[dict[str, Any]]:
        """Return one step's arguments per request, other than the hidden states and the cache."""
        arguments = []
        for query_len, kv_len in zip(self.scenario.query_lens, self.scenario.kv_lens(step), strict=True):
            positions = torch.arange(kv_len - query_len, kv_len, device=self.setting.device)[None]
            embedding = None if self._rotary is None else self._rotary(self.hidden[:1], positions)
            mask = self._mask(query_len, kv_len)
            arguments.append({"attention_mask": mask, **self._model.arguments(embedding, positions)})
        return arguments

    def _mask(self, query_len: int, kv_len: int) -> torch.Tensor | None:
        if query_len == 1:
            return None
        device, dtype = self.setting.device, self.setting.dtype
        visible = torch.ones(query_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - query_len)
        if self._kind == "sdpa":
            return visible[None, None]
        return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]

    def take(self, turn: Turn) -> None:
        """Write the inputs of a turn, and make caches that hold the history alone: they grow."""
        super().take(turn)
        self._caches = []
        for (kv, pe), sign in zip(self._history, turn.signs.tolist(), strict=True):
            cache = self._make_cache()
            if kv.shape[2]:
                cache.update(sign * kv, sign * pe, 0)
            self._caches.append(cache)

    @torch.no_grad()
    def step(self, index: int) -> None:
        rows = self.x.split(self.scenario.query_lens)
        outputs = self.out.split(self.scenario.query_lens)
        requests = zip(rows, outputs, self._caches, self._steps[self.scenario.step(index)], strict=True)
        for hidden, out, cache, arguments in requests:
            out.copy_(self._layer(hidden[None], cache=cache, **arguments)[0][0])

    def facts(self) -> Facts:
        cached = self.scenario.final_lens if hasattr(self, "scenario") else ()
        return Facts(
            cache_bytes=sum(cached) * self.setting.config.latent_dim * self.setting.dtype.itemsize,
            weight_bytes=sum(parameter.nbytes for parameter in self._layer.parameters()),
        )


def require() -> Any:
    """Return the cache class of `transformers`. Raises `TransformersMissing`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require_transformers()
            from transformers import DynamicCache
    except Exception as error:  # what it imports may raise anything, such as torchvision of another torch
        raise TransformersMissing(f"implementation 'transformers': {first_line(error)}") from error
    return DynamicCache


# ----------------------------------------------------------------------------- the class of a config


class NoEquivalentClass(MLAError):
    """No class of `transformers` computes a config."""


@dataclass(frozen=True)
class _Classes:
    """Where a family's classes are, and what they do regardless of their config."""

    module: str
    prefix: str
    attention: str = "Attention"
    interleaved: bool | None = None  # None: as rope_interleave says
    reorders: bool = True  # interleaved channels are cached as evens, then odds
    by_position: bool = False  # scales queries by position, and so takes position_ids
    scales_latents: bool = False
    rotates: bool = True
    takes_head_dim: bool = False  # as a separate field, which must be r
    output_gate: str | None = None

    def load(self) -> tuple[type, type | None, type]:
        """Return the attention, rotary embedding (if any) and config classes. Raises `ImportError`."""
        modeling, configs = (
            importlib.import_module(f"transformers.models.{self.module}.{part}_{self.module}")
            for part in ("modeling", "configuration")
        )
        rotary = getattr(modeling, f"{self.prefix}RotaryEmbedding") if self.rotates else None
        attention = getattr(modeling, f"{self.prefix}{self.attention}")
        return attention, rotary, getattr(configs, f"{self.prefix}Config")


_CLASSES: Mapping[str, _Classes] = {
    "deepseek_v2": _Classes("deepseek_v2", "DeepseekV2", interleaved=True, reorders=False),
    "deepseek_v3": _Classes("deepseek_v3", "DeepseekV3"),
    "sarvam_mla": _Classes("deepseek_v3", "DeepseekV3"),  # that family's own class is a config only
    "glm4_moe_lite": _Classes("glm4_moe_lite", "Glm4MoeLite"),
    "youtu": _Classes("youtu", "Youtu"),
    "axk1": _Classes("axk1", "AXK1"),
    "minicpm3": _Classes("minicpm3", "MiniCPM3", interleaved=False),
    "longcat_flash": _Classes(
        "longcat_flash",
        "LongcatFlash",
        attention="MLA",
        interleaved=True,
        scales_latents=True,
        takes_head_dim=True,
    ),
    "mistral4": _Classes("mistral4", "Mistral4", by_position=True),
    "kimi_linear": _Classes("kimi_linear", "KimiLinear", reorders=False, rotates=False),
    "bailing_hybrid": _Classes("bailing_hybrid", "BailingHybrid", interleaved=True, output_gate="head"),
}


@dataclass(frozen=True)
class TransformersModel:
    """Classes and config of `transformers`; the caller chooses device and dtype to build modules with."""

    attention_class: type
    rotary_class: type | None
    config: Any
    eps: float
    reorders: bool
    takes_position_ids: bool

    def attention(self) -> Any:
        """Build the attention module, with the config's eps in its latent norms."""
        module = self.attention_class(self.config, 0)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if (norm := getattr(module, name, None)) is not None:
                norm.variance_epsilon = self.eps
        return module.eval().requires_grad_(False)

    def rotary(self) -> Any | None:
        """Build the rotary embedding: call it with (hidden, position_ids [1, t]). None if unused."""
        return self.rotary_class(self.config) if self.rotary_class is not None else None

    def arguments(self, embedding: Any | None, positions: torch.Tensor) -> dict[str, Any]:
        """Return the forward's arguments besides hidden states, mask and cache; positions are [1, t]."""
        given = {"position_ids": positions} if self.takes_position_ids else {}
        return given if embedding is None else {**given, "position_embeddings": embedding}

    def to_cache(self, pe: torch.Tensor) -> torch.Tensor:
        """Return rotary keys [.., r] in the channel order of its cache, given in the checkpoint's."""
        return torch.cat((pe[..., 0::2], pe[..., 1::2]), dim=-1) if self.reorders else pe


def transformers_model(config: MLAConfig, kind: str = "sdpa") -> TransformersModel:
    """Return the family's own class if the config has a known `model_type`, else one that computes the same.

    `kind` is "sdpa" or "eager". Raises `NoEquivalentClass`, and `ImportError` when `transformers` is
    missing or too old to have the class.
    """
    classes = _CLASSES.get(config.model_type or "") or _CLASSES[_closest(config)]
    if not _computes(classes, config):
        raise NoEquivalentClass(f"transformers has no attention that computes config '{config.name}'.")
    attention, rotary, config_class = classes.load()
    head = {"head_dim": config.qk_rope_head_dim} if classes.takes_head_dim else {}
    built = config_class(**_dims(config), **head, **_rope(config, classes))
    built._attn_implementation = kind
    reorders = classes.reorders and config.rope_interleave
    return TransformersModel(attention, rotary, built, config.rms_norm_eps, reorders, classes.by_position)


def _closest(config: MLAConfig) -> str:
    if config.output_gate == "head":
        return "bailing_hybrid"
    if config.rope_theta is None:
        return "kimi_linear"
    if config.query_scaling is not None:
        return "mistral4"
    return "longcat_flash" if (config.q_latent_scale, config.kv_latent_scale) != (1, 1) else "deepseek_v3"


def _computes(classes: _Classes, config: MLAConfig) -> bool:
    """Return whether the classes honour every field of the config that a family may fix."""
    scales = (1.0, 1.0)
    if classes.scales_latents:
        d = config.hidden_size
        scales = ((d / (config.q_lora_rank or d)) ** 0.5, (d / config.kv_lora_rank) ** 0.5)
    queries, scaling = config.query_scaling, config.rope_scaling
    original = scaling.original_max_position_embeddings if isinstance(scaling, YarnScaling) else None
    if queries is not None and not (classes.by_position and original in (None, queries.period)):
        return False  # whose period must be YaRN's original length
    return (
        (config.q_lora_rank is not None or not classes.scales_latents)
        and (config.q_latent_scale, config.kv_latent_scale) == scales
        and (config.rope_theta is not None) == classes.rotates
        and config.output_gate == classes.output_gate
        and not (config.sink_logits or config.qk_rope_head_dim == 0 or config.index_topk)
        and (not classes.rotates or classes.interleaved in (None, config.rope_interleave))
    )


def _dims(config: MLAConfig) -> dict[str, Any]:
    dims = {name: getattr(config, name) for name in (*DIMENSIONS, "attention_bias", "rope_interleave")}
    return {**dims, "num_key_value_heads": config.num_attention_heads, "max_position_embeddings": 163840}


def _rope(config: MLAConfig, classes: _Classes) -> dict[str, Any]:
    """Return complete `rope_parameters`, so that the classes' own defaults never apply."""
    if not classes.rotates:
        return {}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if isinstance(scaling, YarnScaling):
        rope |= {key: value for key, value in asdict(scaling).items() if value is not None}
        rope["rope_type"] = "yarn"
    if isinstance(scaling, LongRopeScaling):
        factors = list(scaling.factors)
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        rope |= {"factor": 1.0, "attention_factor": scaling.attention_factor}
        rope |= {"original_max_position_embeddings": 163840}
    if classes.by_position:
        queries = config.query_scaling or QueryScaling(beta=0.0, period=1)
        rope["llama_4_scaling_beta"] = queries.beta
        rope.setdefault("original_max_position_embeddings", queries.period)
    return {"rope_parameters": rope}
