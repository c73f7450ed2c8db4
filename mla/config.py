"""`MLAConfig`: the numbers that define one MLA layer, under their Hugging Face names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mla.errors import ConfigError
from mla.presets import PRESETS


@dataclass(frozen=True)
class YarnScaling:
    """YaRN rotary scaling (https://arxiv.org/abs/2309.00071), keys as in `rope_scaling` of config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def magnitude(self) -> float:
        """Return the factor on cos and sin: m(mscale) / m(mscale_all_dim), or m(1) when either is absent."""
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    def softmax_factor(self) -> float:
        """Return the factor on the softmax scale: m(mscale_all_dim) squared, or 1 when it is absent."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    """Return 0.1 * mscale * ln(factor) + 1 (DeepSeek-V3 `inference/model.py`, class MLA)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


@dataclass(frozen=True)
class MLAConfig:
    """One MLA layer.

    Dimensions are per head unless they say otherwise. `q_lora_rank` None means one `q_proj` instead of the
    `q_a_proj`, `q_a_layernorm`, `q_b_proj` chain. Raises `ConfigError` for values no layer can have.
    """

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnScaling | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        positive = ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        for key in (
            *positive,
            "qk_rope_head_dim",
            *(("q_lora_rank",) if self.q_lora_rank is not None else ()),
        ):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"config '{self.name}': {key} must be a positive integer, got {value!r}.")
        for key in ("rms_norm_eps", "rope_theta"):
            if not _positive(getattr(self, key)):
                raise ConfigError(
                    f"config '{self.name}': {key} must be a positive number, got {getattr(self, key)!r}."
                )
        for key in ("attention_bias", "rope_interleave"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(
                    f"config '{self.name}': {key} must be true or false, got {getattr(self, key)!r}."
                )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"config '{self.name}': qk_rope_head_dim must be even, got {self.qk_rope_head_dim}."
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or an expanded key of one head: n + r."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached token: c + r."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(n + r)^-0.5, times the YaRN magnitude squared. Never derived from c + r."""
        factor = self.rope_scaling.softmax_factor() if self.rope_scaling else 1.0
        return float(self.qk_head_dim**-0.5 * factor)

    def with_heads(self, num_attention_heads: int) -> MLAConfig:
        """Return this config with another head count, as one tensor-parallel rank has."""
        return replace(self, num_attention_heads=num_attention_heads)

    @classmethod
    def preset(cls, name: str) -> MLAConfig:
        """Return a preset by name. Raises `ConfigError` listing the names."""
        if name not in PRESETS:
            raise ConfigError.unknown_preset(name, list(PRESETS))
        return cls.from_dict({**PRESETS[name].values, "name": name})

    @classmethod
    def from_pretrained(cls, source: str | Path | Mapping[str, Any]) -> MLAConfig:
        """Read a config.json: its directory, the file itself, or the parsed dict. Raises `ConfigError`."""
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read config '{path}': {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config '{path}' is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config '{path}' must hold a JSON object, got {type(values).__name__}.")
        return cls.from_dict({"name": str(source), **values})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MLAConfig:
        """Build from Hugging Face keys; keys that do not concern the layer are ignored."""
        name = str(values.get("name", values.get("model_type", "custom")))
        for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"):
            if key not in values:
                raise ConfigError(f"config '{name}' has no {key}, so it does not describe an MLA layer.")
        known = {field.name for field in fields(cls)} - {"rope_scaling", "name"}
        own = {key: value for key, value in values.items() if key in known}
        rope = values.get("rope_scaling") or values.get("rope_parameters")  # older and newer spelling
        if isinstance(rope, Mapping) and "rope_theta" in rope:
            own["rope_theta"] = rope["rope_theta"]
        return cls(**own, rope_scaling=_yarn(name, rope), name=name)


def _positive(value: Any) -> bool:
    """Say whether a value of a config.json is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _yarn(name: str, scaling: Any) -> YarnScaling | None:
    """Read the `rope_scaling` entry. Raises `ConfigError` for a kind that would change the rotation."""
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else scaling
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"config '{name}': rope_scaling type {kind!r} is not supported; 'yarn' is.")
    known = {field.name for field in fields(YarnScaling)}
    extra = sorted(set(scaling) - known - {"type", "rope_type", "rope_theta"})
    if extra:
        raise ConfigError(f"config '{name}': rope_scaling key {extra[0]!r} is not supported.")
    for key in ("factor", "original_max_position_embeddings"):
        if not _positive(scaling.get(key)):
            raise ConfigError(f"config '{name}': rope_scaling needs a positive number '{key}'.")
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        absent = key not in scaling or (key.startswith("mscale") and not scaling[key])
        if not absent and not _positive(scaling[key]):
            raise ConfigError(
                f"config '{name}': rope_scaling key '{key}' must be a positive number, got {scaling[key]!r}."
            )
    return YarnScaling(**{key: value for key, value in scaling.items() if key in known and value is not None})
