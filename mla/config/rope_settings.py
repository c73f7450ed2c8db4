"""Rotary settings of a config.json: the spellings `transformers` reads the same way, or a `ConfigError`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mla.config.families import Family
from mla.errors import ConfigError
from mla_backends.outside import quoted


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

    Two lists would mean that cached keys change when a sequence grows, which no cache can follow.
    """

    factors: tuple[float, ...]  # [r/2], each divides one frequency
    attention_factor: float = 1.0

    def magnitude(self) -> float:
        """Return the factor on cos and sin."""
        return self.attention_factor

    def softmax_factor(self) -> float:
        """Return the factor on the softmax scale, which is 1."""
        return 1.0


@dataclass(frozen=True)
class QueryScaling:
    """A query at position p is multiplied by 1 + beta * ln(1 + floor(p / period))."""

    beta: float
    period: int


RopeScaling = YarnScaling | LongRopeScaling

# Keys that name the kind of scaling.
_KIND = ("type", "rope_type")
# Keys for which null does not mean absent.
_NULL_COUNTS = (*_KIND, "truncate")


@dataclass(frozen=True)
class Rope:
    """The meaning of a config.json's rotary keys; `theta` None means that nothing is rotated."""

    theta: float | None
    scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None


def read_rope(name: str, family: Family, values: Mapping[str, Any], head: tuple[int, int]) -> Rope:
    """Read the rotary keys of config `name`; `head` is (n, r). Raises `ConfigError`.

    As in `transformers`: `rope_scaling` wins over `rope_parameters` as a whole, `rope_type` over `type`, and
    a rope_theta or original length of the same dict, or else of the config, over the default. Where
    `transformers` would guess (a missing original length, a missing factor), this raises.
    """
    if not family.rotates:
        return Rope(None)
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    found = values.get(key) or family.defaults.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"config '{name}': {key} must be an object or null, got {quoted(found)}.")
    given = {key: value for key, value in found.items() if value is not None or key in _NULL_COUNTS}
    spec = _Spec(f"config '{name}': {key}", given)
    theta = found.get("rope_theta", values.get("rope_theta", family.defaults.get("rope_theta", 10000.0)))
    share = spec.values.pop("partial_rotary_factor", values.get("partial_rotary_factor"))
    if share is not None:
        _check_share(name, share, head, family.rotary_share_of_head)
    spec.values.pop("rope_theta", None)
    spec.values.pop("max_position_embeddings", None)
    if "original_max_position_embeddings" in values:
        spec.values["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    queries = _query_scaling(spec) if family.scales_queries else None
    return Rope(theta, _scaling(spec, family, values, head[1] // 2), queries)


@dataclass(frozen=True)
class _Spec:
    """Rotary keys with a value, and how messages name their location."""

    where: str
    values: dict[str, Any]

    def number(self, key: str) -> Any:
        """Return a positive number. Raises `ConfigError`."""
        if not is_positive(self.values.get(key)):
            raise ConfigError(f"{self.where} needs a positive number '{key}'.")
        return self.values[key]

    def check_known(self, known: set[str]) -> None:
        """Raise `ConfigError` for a key that this kind of scaling does not have."""
        extra = sorted(set(self.values) - known - set(_KIND))
        if extra:
            raise ConfigError(f"{self.where} key {quoted(extra[0])} is not supported.")


def is_positive(value: Any) -> bool:
    """Return whether a value of a config.json is a number above 0, within bounds that any real one keeps.

    torch takes integers of 64 bits at most.
    """
    most = 2**63 if isinstance(value, int) else 1e30
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-30 < value < most


def _check_share(name: str, share: Any, head: tuple[int, int], of_head: bool) -> None:
    """Refuse a partial_rotary_factor that does not mean the r rotary channels."""
    whole = sum(head) if of_head else head[1]
    if not is_positive(share) or round(share * whole) != head[1]:
        raise ConfigError(
            f"config '{name}': partial_rotary_factor {quoted(share)} of {whole} channels does not rotate the "
            f"{head[1]} of qk_rope_head_dim, which is not supported."
        )


def _query_scaling(spec: _Spec) -> QueryScaling | None:
    """Take the query scale out of `spec`."""
    beta = spec.values.pop("llama_4_scaling_beta", None)
    if isinstance(beta, bool) or (beta != 0 and not is_positive(beta)):
        raise ConfigError(f"{spec.where} needs a number 'llama_4_scaling_beta' of at least 0.")
    return QueryScaling(beta, spec.number("original_max_position_embeddings")) if beta else None


def _scaling(spec: _Spec, family: Family, values: Mapping[str, Any], half: int) -> RopeScaling | None:
    kind = spec.values.get("rope_type", spec.values.get("type", "default"))
    kind = family.rope_types.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "default":
        spec.check_known({"original_max_position_embeddings"})
        return None
    if kind == "yarn":
        return _yarn(spec)
    if kind == "longrope":
        return _longrope(spec, values, half)
    raise ConfigError(f"{spec.where} type {quoted(kind)} is not supported; 'yarn' and 'longrope' are.")


def _yarn(spec: _Spec) -> YarnScaling:
    known = {field.name for field in fields(YarnScaling)}
    spec.check_known(known)
    for key in ("factor", "original_max_position_embeddings"):
        spec.number(key)
    for key in ("mscale", "mscale_all_dim"):
        if not spec.values.get(key):  # 0 means absent
            spec.values.pop(key, None)
    if not isinstance(spec.values.get("truncate", True), bool):
        raise ConfigError(f"{spec.where} key 'truncate' must be true or false.")
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        if key in spec.values and not is_positive(spec.values[key]):
            found = spec.values[key]
            raise ConfigError(f"{spec.where} key '{key}' must be a positive number, got {quoted(found)}.")
    return YarnScaling(**{key: value for key, value in spec.values.items() if key in known})


def _longrope(spec: _Spec, values: Mapping[str, Any], half: int) -> LongRopeScaling:
    spec.check_known(
        {
            "short_factor",
            "long_factor",
            "factor",
            "attention_factor",
            "original_max_position_embeddings",
        }
    )
    lists = [spec.values.get(key) for key in ("short_factor", "long_factor")]
    for factors in lists:
        if not isinstance(factors, list) or len(factors) != half or not all(map(is_positive, factors)):
            raise ConfigError(
                f"{spec.where} needs lists 'short_factor' and 'long_factor' of {half} positive numbers."
            )
    if lists[0] != lists[1]:
        raise ConfigError(
            f"{spec.where} short_factor and long_factor differ, so cached keys would have to change as a "
            "sequence grows, which is not supported."
        )
    return LongRopeScaling(tuple(lists[0] or ()), _longrope_magnitude(spec, values))


def _longrope_magnitude(spec: _Spec, values: Mapping[str, Any]) -> float:
    """Return attention_factor, or sqrt(1 + ln(factor) / ln(original length)) for a factor above 1."""
    if "attention_factor" in spec.values:
        return spec.number("attention_factor")
    original = spec.number("original_max_position_embeddings")
    if "factor" in spec.values:
        factor = spec.number("factor")
    elif is_positive(values.get("max_position_embeddings")):
        factor = values["max_position_embeddings"] / original
    else:
        raise ConfigError(f"{spec.where} needs a 'factor', or the config max_position_embeddings.")
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
