"""`MLAConfig`: the numbers that define one MLA layer, under their Hugging Face names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mla.config.families import (
    INDEXER_KEYS,
    Family,
    check_keys,
    find_family,
    language_model,
    of_whole,
    refuse,
)
from mla.config.presets import PRESETS
from mla.errors import ConfigError, MLAError, unknown
from mla_backends import outside
from mla_backends.outside import escaped, quoted, shortened


@dataclass(frozen=True)
class YarnScaling:
    """YaRN rotary scaling (https://arxiv.org/abs/2309.00071), keys as in `rope_scaling` of config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True  # round the ends of the ramp to whole channels

    def magnitude(self) -> float:
        """Return the factor on cos and sin.

        `attention_factor` if given, else m(mscale) / m(mscale_all_dim), or m(1) when either is absent.
        """
        if self.attention_factor is not None:
            return self.attention_factor
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
class LongRopeScaling:
    """LongRoPE (https://arxiv.org/abs/2402.13753) with one list of divisors for every length.

    With two lists, cached keys would change as a sequence grows.
    """

    factors: tuple[float, ...]  # [r/2], each divides one frequency
    attention_factor: float = 1.0

    def magnitude(self) -> float:
        """Return the factor on cos and sin."""
        return self.attention_factor

    def softmax_factor(self) -> float:
        """Return the factor on the softmax scale: 1."""
        return 1.0


@dataclass(frozen=True)
class QueryScaling:
    """A query at position p is multiplied by 1 + beta * ln(1 + floor(p / period))."""

    beta: float
    period: int


RopeScaling = YarnScaling | LongRopeScaling


def is_positive(value: Any) -> bool:
    """Return whether a value of a config.json is a number above 0, within bounds that any real one keeps.

    torch takes integers of 64 bits at most.
    """
    most = 2**63 if isinstance(value, int) else 1e30
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-30 < value < most


@dataclass(frozen=True)
class _RopeKeys:
    """The rotary keys that have a value, and how messages name their place."""

    where: str
    values: dict[str, Any]

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.where} {what}.")

    def number(self, key: str) -> Any:
        """Return a positive number. Raises `ConfigError`."""
        if not is_positive(value := self.values.get(key)):
            raise self.error(f"needs a positive number '{key}', got {quoted(value)}")
        return value


def read_rope(name: str, family: Family, values: Mapping[str, Any], head: tuple[int, int]) -> dict[str, Any]:
    """Read the rotary keys of config `name` as fields of `MLAConfig`; `head` is (n, r). Raises `ConfigError`.

    As in `transformers`: `rope_scaling` wins over `rope_parameters` as a whole, `rope_type` over `type`, and
    a rope_theta or original length of the same dict, or else of the config, over the default. Where
    `transformers` would guess (a missing original length, a missing factor), this raises.
    """
    if not family.rotates:
        return {"rope_theta": None}
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(key) or family.defaults.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config '{name}': {key} must be an object or null, got {quoted(given)}.")
    theta = given.get("rope_theta", values.get("rope_theta", family.defaults.get("rope_theta", 10000.0)))
    share = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    whole = sum(head) if family.rotary_share_of_head else head[1]
    ignored = share is None or "partial_rotary_factor" in family.ignores
    if not ignored and not (is_positive(share) and round(share * whole) == head[1]):
        raise ConfigError(
            f"config '{name}': partial_rotary_factor {quoted(share)} of {whole} channels does not rotate the "
            f"{head[1]} of qk_rope_head_dim; that is not supported."
        )
    # Null means absent, but for these.
    rope = {key: value for key, value in given.items() if value is not None or key in (*_KIND, "truncate")}
    if "original_max_position_embeddings" in values:
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    for read in ("rope_theta", "partial_rotary_factor", "max_position_embeddings"):
        rope.pop(read, None)
    keys = _RopeKeys(f"config '{name}': {key}", rope)
    queries = _query_scaling(keys) if family.scales_queries else None
    scaling = _scaling(keys, family, values, head[1] // 2)
    return {"rope_theta": theta, "rope_scaling": scaling, "query_scaling": queries}


def _query_scaling(keys: _RopeKeys) -> QueryScaling | None:
    """Take the query scale out of `keys`."""
    beta = keys.values.pop("llama_4_scaling_beta", None)
    if isinstance(beta, bool) or (beta != 0 and not is_positive(beta)):
        raise keys.error("needs a number 'llama_4_scaling_beta' of at least 0")
    return QueryScaling(beta, keys.number("original_max_position_embeddings")) if beta else None


_KIND = ("type", "rope_type")
_ORIGINAL = "original_max_position_embeddings"
# Kinds of scaling, and what each may have besides.
_KNOWN = {
    "default": (_ORIGINAL,),
    "yarn": tuple(field.name for field in fields(YarnScaling)),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", _ORIGINAL),
}


def _scaling(keys: _RopeKeys, family: Family, values: Mapping[str, Any], half: int) -> RopeScaling | None:
    kind = keys.values.get("rope_type", keys.values.get("type", "default"))
    kind = family.rope_types.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise keys.error(f"type {quoted(kind)} is not supported; 'yarn' and 'longrope' are")
    if extra := sorted(keys.values.keys() - {*_KNOWN[kind], *_KIND}):
        raise keys.error(f"key {quoted(extra[0])} is not supported")
    if kind == "default":
        return None
    return _yarn(keys) if kind == "yarn" else _longrope(keys, values, half)


def _yarn(keys: _RopeKeys) -> YarnScaling:
    given = {key: value for key, value in keys.values.items() if key not in _KIND}
    for key in ("mscale", "mscale_all_dim"):
        if not given.get(key):  # 0 means absent
            given.pop(key, None)
    if not isinstance(given.get("truncate", True), bool):
        raise keys.error("key 'truncate' must be true or false")
    for key in sorted({"factor", _ORIGINAL, *given} - {"truncate"}):
        keys.number(key)
    return YarnScaling(**given)


def _longrope(keys: _RopeKeys, values: Mapping[str, Any], half: int) -> LongRopeScaling:
    """Read the one list of divisors, and attention_factor, or sqrt(1 + ln(factor) / ln(original length))."""
    lists: list[Any] = [keys.values.get(key) for key in ("short_factor", "long_factor")]
    for factors in lists:
        if not isinstance(factors, list) or len(factors) != half or not all(map(is_positive, factors)):
            raise keys.error(f"needs lists 'short_factor' and 'long_factor' of {half} positive numbers")
    if lists[0] != lists[1]:
        raise keys.error(
            "lists short_factor and long_factor that differ: cached keys would change with length"
        )
    if "attention_factor" in keys.values:
        return LongRopeScaling(tuple(lists[0]), keys.number("attention_factor"))
    original, longest = keys.number(_ORIGINAL), values.get("max_position_embeddings")
    if original <= 1:  # its logarithm is divided by
        raise keys.error(f"needs a number '{_ORIGINAL}' above 1, got {quoted(original)}")
    if "factor" not in keys.values and is_positive(longest):
        keys.values["factor"] = longest / original
    factor = max(1.0, keys.number("factor"))
    return LongRopeScaling(tuple(lists[0]), math.sqrt(1 + math.log(factor) / math.log(original)))


# ------------------------------------------------------------------------------------- layer config

# Fields that are dimensions, all of them keys of a config.json.
DIMENSIONS = (
    "hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
# Fields that are not keys of a config.json.
_READ_APART = {"rope_theta", "rope_scaling", "query_scaling", "model_type", "name"}
_MAY_BE_0 = {"qk_rope_head_dim", "index_topk", "index_n_heads", "index_head_dim"}


@dataclass(frozen=True, repr=False)
class MLAConfig:
    """One MLA layer.

    Dimensions are per head unless they say otherwise. `q_lora_rank` None means one `q_proj` instead of the
    `q_a_proj`, `q_a_layernorm`, `q_b_proj` chain. `rms_norm_eps` is that of the two latent norms: read from a
    config.json that names its family it is 1e-6, because the classes of `transformers` pass none to these
    norms even where the file says 1e-5; use `dataclasses.replace` to change it.

    With `index_n_heads` and `index_topk`, an indexer scores all keys that a query sees, and attention is to
    the best `index_topk` of them (DeepSeek-V3.2). With `index_topk` alone, a layer attends what an earlier
    layer selected. `indexer_types` are those of the whole model: `of_layer` makes the config of one layer.
    Raises `ConfigError` for invalid values.
    """

    hidden_size: int  # d
    num_attention_heads: int  # h
    q_lora_rank: int | None = None  # width of the query latent
    kv_lora_rank: int = 512  # c, width of the cached latent; all heads share it
    qk_nope_head_dim: int = 128  # n, channels of a query or key that are not rotated
    qk_rope_head_dim: int = 64  # r, channels that are, or 0; all heads share those of the key
    v_head_dim: int = 128  # v
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # on q_a, kv_a and o; never on q, q_b and kv_b
    rope_theta: float | None = 10000.0  # None: nothing is rotated
    rope_interleave: bool = True  # channels (0, 1), (2, 3), ... are rotated together, else i and i + r/2
    rope_scaling: RopeScaling | None = None
    q_latent_scale: float = 1.0  # on the normed query latent, and so on queries
    kv_latent_scale: float = 1.0  # on the normed latent, before it is cached
    query_scaling: QueryScaling | None = None  # of queries by position
    output_gate: str | None = None  # sigmoid(g_proj x) on the heads' outputs, one per "head" or "element"
    sink_logits: bool = False  # a learned logit per head joins the softmax, of no key and value
    index_topk: int = 0  # most keys that a query attends, as an indexer scores them; 0: all
    index_n_heads: int = 0  # of the indexer; 0 with index_topk: a layer that shares another's selection
    index_head_dim: int = 128  # of the indexer, whose first r channels rotate
    indexer_rope_interleave: bool = False  # as rope_interleave, of the indexer's queries and keys
    indexer_types: tuple[str, ...] = ()  # of a model's layers: "full" or "shared"; (): all have an indexer
    model_type: str | None = None  # the family it was read as; computes nothing
    name: str = "custom"

    def __post_init__(self) -> None:
        if isinstance(self.indexer_types, list):  # as in a config.json
            object.__setattr__(self, "indexer_types", tuple(self.indexer_types))
        for field in fields(self):
            self._check_value(field.name, field.type)
        if self.output_gate not in (None, "head", "element"):
            raise self._error(
                f"output_gate must be null, 'head' or 'element', got {quoted(self.output_gate)}"
            )
        if self.qk_rope_head_dim % 2:
            raise self._error(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.rope_theta == 1 and isinstance(self.rope_scaling, YarnScaling):
            raise self._error("rope_theta must not be 1 under YaRN")
        if self.q_lora_rank is None and self.q_latent_scale != 1:
            raise self._error("q_latent_scale needs a q_lora_rank: without one, queries have no latent")
        kinds = self.indexer_types
        if not isinstance(kinds, tuple) or not {*map(repr, kinds)} <= {"'full'", "'shared'"}:
            raise self._error(f"indexer_types must list 'full' and 'shared', got {quoted(kinds)}")
        if kinds and kinds[0] != "full":
            raise self._error("indexer_types must begin with 'full': no layer is before it to share with")
        if self.index_n_heads and (not self.index_topk or self.q_lora_rank is None):
            raise self._error(
                "index_n_heads needs a positive index_topk and a q_lora_rank, whose latent it reads"
            )
        if self.index_n_heads and self.index_head_dim < (least := max(1, self.qk_rope_head_dim)):
            raise self._error(
                f"index_head_dim must be at least {least}, as qk_rope_head_dim, got {self.index_head_dim}"
            )

    def _check_value(self, key: str, kind: Any) -> None:
        """Raise `ConfigError` where a number or a switch is none, by the annotation of its field."""
        value, least = getattr(self, key), 0 if key in _MAY_BE_0 else 1
        rules = {
            "int": (f"an integer of at least {least}", type(value) is int and least <= value < 2**31),
            "float": ("a positive number", is_positive(value)),
            "bool": ("true or false", isinstance(value, bool)),
        }
        what, fits = rules.get(kind.removesuffix(" | None"), ("", True))
        if not fits and not (value is None and kind.endswith("None")):
            raise self._error(f"{key} must be {what}, got {quoted(value)}")

    def __repr__(self) -> str:
        """Return the name, all dimensions, and every other field that has no default value."""
        shown = [f"{key}={getattr(self, key)}" for key in DIMENSIONS]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*DIMENSIONS, "name") and value != field.default:
                shown.append(f"{field.name}={shortened(repr(value), 60)}")
        return f"MLAConfig({self.name!r}, {', '.join(shown)})"

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
    def gate_width(self) -> int:
        """Gates of one token, the rows of g_proj: h, h * v, or 0 without an output gate."""
        per_head = {None: 0, "head": 1, "element": self.v_head_dim}[self.output_gate]
        return self.num_attention_heads * per_head

    @property
    def is_odd(self) -> bool:
        """Whether negated inputs over a negated cache negate the output.

        Biases, gates and selections prevent that.
        """
        return not self.attention_bias and self.output_gate is None and not self.index_topk

    @property
    def is_ops_alone(self) -> bool:
        """Whether a layer computes nothing beside its ops, as gates, sinks and an indexer's scales are."""
        return self.output_gate is None and not self.sink_logits and not self.index_topk

    @property
    def index_scale(self) -> float:
        """(heads * head_dim)^-0.5 of the indexer: all factors on its scores, which its weights carry.

        `transformers` applies head_dim^-0.5 before the relu instead, which a positive factor does not change.
        """
        return float((self.index_n_heads * self.index_head_dim) ** -0.5)

    def index_layers(self, count: int) -> tuple[int, ...]:
        """Return the numbers of those of a model's first `count` layers that have an indexer.

        Layers beyond `indexer_types` draft tokens (multi-token prediction), and each has an indexer of its
        own.
        """
        if not self.index_n_heads:
            return ()
        kinds = self.indexer_types + ("full",) * (count - len(self.indexer_types))  # drafts have their own
        return tuple(layer for layer in range(count) if kinds[layer] == "full")

    def of_layer(self, number: int) -> MLAConfig:
        """Return the config of one of a model's layers: without index heads where it shares a selection.

        `index_topk` stays, and so the layer attends a selection that it is given.
        """
        shares = "shared" in self.indexer_types[number : number + 1]
        return replace(self, indexer_types=(), index_n_heads=0 if shares else self.index_n_heads)

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
            raise ConfigError(unknown("config", name, list(PRESETS), "Presets"))
        return cls.from_dict({**PRESETS[name].values, "name": name})

    @classmethod
    def named(cls, name: str) -> MLAConfig:
        """Return a preset, or what a path to a config.json, or to its folder, holds. Raises `ConfigError`."""
        path = "/" in name or name.endswith(".json") or os.path.isdir(name)  # Path("") would be one
        if not path or name in PRESETS:
            return cls.preset(name)
        for preset, known in PRESETS.items():
            if known.checkpoint.lower() == name.lower() and not os.path.exists(name):
                raise ConfigError(
                    f"config '{name}' is not a file. Use the preset '{preset}', this model's own."
                )
        return cls.from_pretrained(name)

    @classmethod
    def from_pretrained(cls, source: str | Path | Mapping[str, Any]) -> MLAConfig:
        """Read a config.json: its directory, the file itself, or the parsed dict. Raises `ConfigError`.

        A directory is a checkpoint, whose files must not be links that leave it, or its hub cache.
        """
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        path = Path(source)
        folder = path if path.is_dir() else None
        path = path / "config.json" if folder else path
        try:
            data = outside.read(path.name if folder else path, folder)
        except OSError as error:
            raise ConfigError(f"cannot read config '{path}': {error.strerror}.") from error
        return cls.from_dict({"name": str(source), **json_object(data, f"config '{path}'", ConfigError)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MLAConfig:
        """Build from the keys of a Hugging Face config.json, read as the code of its `model_type` does.

        A multimodal config gives its language model's layer. Keys that do not concern the layer are ignored,
        and so are head_dim and max_position_embeddings, which no weight and no angle of MLA depends on.
        Raises `ConfigError` for a family or key that means a different attention, and for an unknown family.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"from_dict() takes the keys of a config.json, got {values!r:.80}.")
        inner = of_whole(values, language_model(values))
        name = shortened(escaped(str(values.get("name", inner.get("model_type", "custom")))))
        refuse(name, values)
        refuse(name, inner)
        for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"):
            if key not in inner:
                raise ConfigError(f"config '{name}' has no {key}, so it does not describe an MLA layer.")
        kind, family = find_family(name, inner)
        check_keys(name, family, values)
        config = _plain(cls, family, {**family.defaults, **inner}, model_type=kind, name=name)
        _check_agreement(config, inner)
        rope = read_rope(name, family, inner, (config.qk_nope_head_dim, config.qk_rope_head_dim))
        if family.rotates and rope["rope_theta"] is None:
            raise ConfigError(f"config '{name}': rope_theta must be a positive number, got None.")
        return replace(config, **rope)


def json_object(data: bytes, what: str, kind: type[MLAError]) -> dict[str, Any]:
    """Return the object that the JSON text of a file, `what`, is. Raises an error of `kind`."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise kind(f"{what} is not valid JSON: {shortened(str(error))}.") from error
    if not isinstance(values, dict):
        raise kind(f"{what} must hold a JSON object, got {type(values).__name__}.")
    return values


def require_config(config: Any) -> None:
    """Raise ValueError unless this is an `MLAConfig`."""
    if not isinstance(config, MLAConfig):
        got = quoted(config) if isinstance(config, str) else f"a {type(config).__name__}"
        raise ValueError(f"config must be an MLAConfig, as MLAConfig.named(NAME) returns, got {got}.")


def _plain(cls: type[MLAConfig], family: Family, values: Mapping[str, Any], **names: Any) -> MLAConfig:
    """Return the config without its rotary keys: given values, then derived ones, then fixed ones."""
    known = {field.name for field in fields(cls)} - _READ_APART
    known -= set() if family.indexes else {*INDEXER_KEYS, "indexer_rope_interleave"}
    absent = {key for key in family.derived if values.get(key) is None}
    config = cls(**{key: value for key, value in values.items() if key in known - absent}, **names)
    derived = {key: family.derived[key]({**values, **vars(config)}) for key in absent}
    return replace(config, **derived, **family.fixed)


def _check_agreement(config: MLAConfig, values: Mapping[str, Any]) -> None:
    """Refuse keys that contradict the layer's dimensions: they would mean a different attention."""
    width, shared = config.qk_head_dim, "heads share keys and values in groups: that is not MLA"
    for key, only, what in (
        ("num_key_value_heads", config.num_attention_heads, f"num_attention_heads: {shared}"),
        ("qk_head_dim", width, "qk_nope_head_dim + qk_rope_head_dim"),
        ("q_head_dim", width, "qk_nope_head_dim + qk_rope_head_dim"),
    ):
        if values.get(key) not in (None, only):
            got = quoted(values[key])
            raise ConfigError(f"config '{config.name}': {key} {got} is not {only}, {what}.")
