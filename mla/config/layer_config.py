"""`MLAConfig`: the numbers that define one MLA layer, under their Hugging Face names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mla.config.families import Family, check_keys, find_family, language_model, refuse
from mla.config.presets import PRESETS
from mla.config.rope_settings import (
    LongRopeScaling,
    QueryScaling,
    RopeScaling,
    YarnScaling,
    is_positive,
    read_rope,
)
from mla.errors import ConfigError
from mla_backends import outside
from mla_backends.outside import escaped, quoted, shortened

__all__ = ["DIMENSIONS", "LongRopeScaling", "MLAConfig", "QueryScaling", "YarnScaling"]

# Keys of a config.json that must agree with the head's width, where they are given.
_WIDTHS = ("qk_head_dim", "q_head_dim")
# Fields that are dimensions, all of them keys of a config.json.
DIMENSIONS = (
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
# Fields that are not keys of a config.json.
_READ_APART = {"rope_theta", "rope_scaling", "query_scaling", "model_type", "name"}


@dataclass(frozen=True)
class MLAConfig:
    """One MLA layer.

    Dimensions are per head unless they say otherwise. `q_lora_rank` None means one `q_proj` instead of the
    `q_a_proj`, `q_a_layernorm`, `q_b_proj` chain. `rms_norm_eps` is that of the two latent norms: read from
    a config.json that names its family it is 1e-6, because the classes of `transformers` pass none to these
    norms even where the file says 1e-5; use `dataclasses.replace` to change it. Raises `ConfigError` for
    invalid values.
    """

    hidden_size: int  # d
    num_attention_heads: int  # h
    q_lora_rank: int | None = None  # width of the query latent
    kv_lora_rank: int = 512  # c, width of the cached latent; all heads share it
    qk_nope_head_dim: int = 128  # n, channels of a query or key that are not rotated
    qk_rope_head_dim: int = 64  # r, channels that are; all heads share those of the key
    v_head_dim: int = 128  # v
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # on q_a, kv_a and o; never on q, q_b and kv_b
    rope_theta: float | None = 10000.0  # None: nothing is rotated
    rope_interleave: bool = True  # channels (0, 1), (2, 3), ... are rotated together, else i and i + r/2
    rope_scaling: RopeScaling | None = None
    q_latent_scale: float = 1.0  # on the normed query latent, and so on queries
    kv_latent_scale: float = 1.0  # on the normed latent, which is cached scaled
    query_scaling: QueryScaling | None = None  # of queries by position
    model_type: str | None = None  # the family it was read as; computes nothing
    name: str = "custom"

    def __post_init__(self) -> None:
        for key in DIMENSIONS:
            value = getattr(self, key)
            optional = key == "q_lora_rank" and value is None
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not optional and not (whole and 0 < value < 2**31):
                raise self._error(f"{key} must be a positive integer, got {quoted(value)}")
        for key in ("rms_norm_eps", "rope_theta", "q_latent_scale", "kv_latent_scale"):
            value = getattr(self, key)
            if not is_positive(value) and not (key == "rope_theta" and value is None):
                raise self._error(f"{key} must be a positive number, got {quoted(value)}")
        for key in ("attention_bias", "rope_interleave"):
            if not isinstance(getattr(self, key), bool):
                raise self._error(f"{key} must be true or false, got {quoted(getattr(self, key))}")
        if self.qk_rope_head_dim % 2:
            raise self._error(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.rope_theta == 1 and isinstance(self.rope_scaling, YarnScaling):
            raise self._error("rope_theta must not be 1 under YaRN")
        if self.q_lora_rank is None and self.q_latent_scale != 1:
            raise self._error("q_latent_scale needs a q_lora_rank, without which queries have no latent")

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"config '{self.name}': {what}.")

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
        """Return this config with a different head count, such as that of one tensor-parallel rank."""
        return replace(self, num_attention_heads=num_attention_heads)

    @classmethod
    def preset(cls, name: str) -> MLAConfig:
        """Return a preset by name. Raises `ConfigError` listing the names."""
        if name not in PRESETS:
            raise ConfigError.unknown_preset(name, list(PRESETS))
        return cls.from_dict({**PRESETS[name].values, "name": name})

    @classmethod
    def named(cls, name: str) -> MLAConfig:
        """Return a preset, or what a path to a config.json, or to its folder, holds. Raises `ConfigError`.

        What a folder holds may be a link to anywhere, as data version control makes them.
        """
        path = "/" in name or name.endswith(".json") or os.path.isdir(name)  # Path("") would be one
        if not path or name in PRESETS:
            return cls.preset(name)
        return cls._read(Path(name, "config.json") if os.path.isdir(name) else Path(name), None, name)

    @classmethod
    def from_pretrained(cls, source: str | Path | Mapping[str, Any]) -> MLAConfig:
        """Read a config.json: its directory, the file itself, or the parsed dict. Raises `ConfigError`.

        A directory is a checkpoint, whose files must not be links that leave it, or its hub cache.
        """
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        path = Path(source)
        if path.is_dir():
            return cls._read(path / "config.json", path, str(source))
        return cls._read(path, None, str(source))

    @classmethod
    def _read(cls, path: Path, folder: Path | None, name: str) -> MLAConfig:
        """Read a file that was named, or that lies in the `folder` that was. Raises `ConfigError`."""
        try:
            values = json.loads(outside.read(path if folder is None else path.name, folder))
        except OSError as error:
            raise ConfigError(f"cannot read config '{path}': {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config '{path}' is not valid JSON: {shortened(str(error))}.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config '{path}' must hold a JSON object, got {type(values).__name__}.")
        return cls.from_dict({"name": name, **values})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MLAConfig:
        """Build from the keys of a Hugging Face config.json, read as the code of its `model_type` does.

        A multimodal config gives its language model's layer. Keys that do not concern the layer are ignored,
        and so are head_dim and max_position_embeddings, which no weight and no angle of MLA depends on.
        Raises `ConfigError` for a family or key that means a different attention, and for an unknown family.
        """
        inner = language_model(values)
        name = shortened(escaped(str(values.get("name", inner.get("model_type", "custom")))))
        refuse(name, values)
        refuse(name, inner)
        for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"):
            if key not in inner:
                raise ConfigError(f"config '{name}' has no {key}, so it does not describe an MLA layer.")
        kind, family = find_family(name, inner)
        check_keys(name, family, inner)
        config = _plain(cls, family, {**family.defaults, **inner}, model_type=kind, name=name)
        _check_agreement(config, inner)
        rope = read_rope(name, family, inner, (config.qk_nope_head_dim, config.qk_rope_head_dim))
        if family.rotates and rope.theta is None:
            raise ConfigError(f"config '{name}': rope_theta must be a positive number, got None.")
        return replace(
            config, rope_theta=rope.theta, rope_scaling=rope.scaling, query_scaling=rope.query_scaling
        )


def _plain(cls: type[MLAConfig], family: Family, values: Mapping[str, Any], **names: Any) -> MLAConfig:
    """Return the config without its rotary keys: given values, then derived ones, then fixed ones."""
    known = {field.name for field in fields(cls)} - _READ_APART
    absent = {key for key in family.derived if values.get(key) is None}
    own = {key: value for key, value in values.items() if key in known - absent}
    config = cls(**own, **names)
    derived = {key: family.derived[key](vars(config)) for key in absent}
    return replace(config, **derived, **family.fixed)


def _check_agreement(config: MLAConfig, values: Mapping[str, Any]) -> None:
    """Refuse keys that contradict the layer's dimensions: they would mean a different attention."""
    heads = values.get("num_key_value_heads")
    if heads is not None and heads != config.num_attention_heads:
        raise ConfigError(
            f"config '{config.name}': num_key_value_heads {quoted(heads)} is not num_attention_heads "
            f"{config.num_attention_heads}, so heads share keys and values in groups, which is not MLA."
        )
    for key in _WIDTHS:
        width = values.get(key)
        if width is not None and width != config.qk_head_dim:
            raise ConfigError(
                f"config '{config.name}': {key} {quoted(width)} is not qk_nope_head_dim + qk_rope_head_dim, "
                f"{config.qk_head_dim}."
            )
