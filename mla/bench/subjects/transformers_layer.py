"""The attention layer of `transformers` for the model's family, run one request at a time.

Position embeddings and masks are computed outside the timed region, since a model computes them once per
forward for all layers. The class that computes a config is chosen here, and the channel order of its cache.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mla.bench.subjects.base import Facts, LayerImplementation
from mla.bench.subjects.inputs import Inputs, Turn
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.config import DIMENSIONS, LongRopeScaling, MLAConfig, QueryScaling, YarnScaling
from mla.config.families import FAMILIES
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


# Modules of `transformers` that have an attention, and how the names of their classes begin.
_PREFIXES = {
    "deepseek_v2": "DeepseekV2",
    "glm4_moe_lite": "Glm4MoeLite",
    "youtu": "Youtu",
    "axk1": "AXK1",
    "minicpm3": "MiniCPM3",
    "deepseek_v3": "DeepseekV3",
    "kimi_linear": "KimiLinear",
    "mistral4": "Mistral4",
    "longcat_flash": "LongcatFlash",
    "bailing_hybrid": "BailingHybrid",
}
# Those that also compute configs of other families, the plainest first.
_COMMON = ("deepseek_v3", "kimi_linear", "mistral4", "longcat_flash", "bailing_hybrid")
# Those that cache interleaved channels as they are; others cache evens, then odds.
_AS_THEY_ARE = ("deepseek_v2", "kimi_linear")


def classes_of(module: str, prefix: str) -> tuple[type, type | None, type]:
    """Return the attention, rotary embedding (if any) and config classes. Raises `TransformersMissing`."""
    where = f"transformers.models.{module}"
    try:
        modeling = importlib.import_module(f"{where}.modeling_{module}")
        configs = importlib.import_module(f"{where}.configuration_{module}")
    except Exception as error:  # a release may lack it, and what it imports may raise anything
        said = f"implementation 'transformers' needs a release that has {where}"
        raise TransformersMissing(f"{said} ({first_line(error)}).") from error
    attention = f"{prefix}{'MLA' if module == 'longcat_flash' else 'Attention'}"
    rotary = getattr(modeling, f"{prefix}RotaryEmbedding") if FAMILIES[module].rotates else None
    return getattr(modeling, attention), rotary, getattr(configs, f"{prefix}Config")


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

    `kind` is "sdpa" or "eager". Raises `NoEquivalentClass`, and `TransformersMissing` when `transformers` is
    missing, too old to have the class, or does not import.
    """
    named = "deepseek_v3" if config.model_type == "sarvam_mla" else config.model_type  # whose own is a config
    modules = (named,) if named in _PREFIXES else _COMMON
    for module in modules if config.qk_rope_head_dim else ():  # none does without rotary channels
        attention, rotary, config_class = classes_of(module, _PREFIXES[module])
        built = _built(config, config_class, module)
        if built is not None:
            built._attn_implementation = kind
            reorders = module not in _AS_THEY_ARE and config.rope_interleave
            by_position = FAMILIES[module].scales_queries
            return TransformersModel(attention, rotary, built, config.rms_norm_eps, reorders, by_position)
    raise NoEquivalentClass(f"transformers has no attention that computes config '{config.name}'.")


def _built(config: MLAConfig, config_class: Any, module: str) -> Any | None:
    """Return a config of a class of `transformers`; None if it is not read as the same layer again.

    The eps of its norms does not count: it is set on the module.
    """
    head = {"head_dim": config.qk_rope_head_dim} if module == "longcat_flash" else {}
    try:
        built = config_class(**dims(config), **head, **rope(config, module))
        read = MLAConfig.from_dict(built.to_dict())
    except Exception:  # noqa: BLE001  # classes check types, and families what they can have
        return None
    same = {name: getattr(config, name) for name in ("name", "model_type", "rms_norm_eps")}
    return built if replace(read, **same) == config else None


def dims(config: MLAConfig) -> dict[str, Any]:
    """Return what all config classes of `transformers` take alike."""
    given = {name: getattr(config, name) for name in (*DIMENSIONS, "attention_bias", "rope_interleave")}
    return {**given, "num_key_value_heads": config.num_attention_heads, "max_position_embeddings": 163840}


def rope(config: MLAConfig, module: str) -> dict[str, Any]:
    """Return complete `rope_parameters`, so that the classes' own defaults never apply."""
    family = FAMILIES[module]
    if not family.rotates or config.rope_theta is None:
        return {}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if isinstance(scaling, YarnScaling):
        parameters |= {key: value for key, value in asdict(scaling).items() if value is not None}
        parameters["rope_type"] = "yarn"
    if isinstance(scaling, LongRopeScaling):
        factors = list(scaling.factors)
        parameters |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        parameters |= {"factor": 1.0, "attention_factor": scaling.attention_factor}
        parameters |= {"original_max_position_embeddings": 163840}
    if family.scales_queries:
        queries = config.query_scaling or QueryScaling(beta=0.0, period=1)
        parameters["llama_4_scaling_beta"] = queries.beta
        parameters.setdefault("original_max_position_embeddings", queries.period)
    return {"rope_parameters": parameters}
