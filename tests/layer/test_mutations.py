"""Deliberately wrong variants: each must fail the very check that the right code passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla import MLAConfig
from mla.layer.rope import RotaryTable
from mla.reference import REFERENCE

Latent, Expanded = type(REFERENCE["latent_attention"]), type(REFERENCE["expanded_attention"])
Rotate, Write = type(REFERENCE["rotate_query"]), type(REFERENCE["write_latent"])
FAILS = r"worst row error|rows are wrong|natural logarithm is|NaN or infinity"


class HeadOff(Latent):  # type: ignore[misc, valid-type]
    """One head of one request is 5% off."""

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state, **tensors)
        tensors["out"][tensors["cu_q"][1] : tensors["cu_q"][2], -1] *= 1.05


class MovedMask(Latent):  # type: ignore[misc, valid-type]
    """The last visible key of every masked query is moved."""

    by = 0

    def prepare(self, spec: Any, batch: Any) -> Any:
        return tuple(
            group if group.hidden is None else group._replace(hidden=self.moved(group.hidden))
            for group in super().prepare(spec, batch)
        )

    def moved(self, hidden: torch.Tensor) -> torch.Tensor:
        moved = hidden.roll(self.by, dims=-1)  # a query that may see more keys, or fewer
        moved[..., 0 if self.by > 0 else -1] = self.by < 0
        return moved


class FutureLeak(MovedMask):
    by = 1


class MaskShort(MovedMask):
    by = -1


class LatentScale(Latent):  # type: ignore[misc, valid-type]
    """The scale is derived from the width of the latent row (576^-0.5 at DeepSeek's dimensions)."""

    def __call__(self, state: Any, **tensors: Any) -> None:
        tensors["softmax_scale"] = tensors["q"].shape[-1] ** -0.5
        super().__call__(state, **tensors)


class LastPageDropped(Latent):  # type: ignore[misc, valid-type]
    """A decode request misses its last, partly filled page."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        page = batch.page_size
        lens = [
            kv - kv % page if query == 1 and kv > page else kv
            for query, kv in zip(batch.query_lens, batch.kv_lens, strict=True)
        ]
        return super().prepare(spec, altered(batch, kv_lens=tuple(lens)))


class PageSwapped(Latent):  # type: ignore[misc, valid-type]
    """The first page of a request is that of its neighbour."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        table = batch.block_table.clone()
        table[:, 0] = table[:, 0].roll(1)
        return super().prepare(spec, altered(batch, block_table=table))


class LogTwo(Latent):  # type: ignore[misc, valid-type]
    """The log-sum-exp is to base 2."""

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state, **tensors)
        tensors["lse"] /= torch.tensor(2.0).log()


def altered(batch: Any, **changes: Any) -> SimpleNamespace:
    names = ("query_lens", "kv_lens", "page_size", "block_table", "kv_lens_device", "cu_q")
    return SimpleNamespace(**{**{name: getattr(batch, name) for name in names}, **changes})


LATENT_MUTANTS = [HeadOff, FutureLeak, MaskShort, LatentScale, LastPageDropped, PageSwapped]


@pytest.mark.parametrize("mutant", [*LATENT_MUTANTS, LogTwo])
def test_the_op_check_fails_a_wrong_latent_attention(check_latent: Any, mutant: type) -> None:
    check_latent(Latent())
    with pytest.raises(AssertionError, match=FAILS):
        check_latent(mutant())


@pytest.mark.parametrize("mutant", LATENT_MUTANTS)
def test_the_layer_check_fails_a_wrong_latent_attention(check_layer: Any, mutant: type) -> None:
    with pytest.raises(AssertionError, match=FAILS):
        check_layer(ops={"mutant": mutant()}, attention="absorbed")


@pytest.mark.parametrize("attention", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_check_passes_the_right_layer(check_layer: Any, attention: str, dtype: torch.dtype) -> None:
    check_layer(attention=attention, dtype=dtype)


def test_the_layer_check_passes_right_ops_of_a_backend(check_layer: Any) -> None:
    check_layer(ops={"latent": Latent(), "expanded": Expanded(), "rotate": Rotate(), "write": Write()})


class ExpandedHeadOff(Expanded):  # type: ignore[misc, valid-type]
    """One head of the first segment is 5% off."""

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state, **tensors)
        tensors["out"][: state.query_lens[0], 0] *= 1.05


class Unmasked(Expanded):  # type: ignore[misc, valid-type]
    def prepare(self, spec: Any, batch: Any) -> Any:
        return replace(super().prepare(spec, batch), causal=False)


class EarlyKeys(Expanded):  # type: ignore[misc, valid-type]
    """Causality is aligned at the first key instead of the last."""

    lse_optional = False

    def __call__(self, state: Any, **tensors: Any) -> None:
        q, k, v, out, lse = (tensors[name] for name in ("q", "k", "v", "out", "lse"))
        first_q = first_k = 0
        for queries, keys in zip(state.query_lens, state.kv_lens, strict=True):
            rows, seen = slice(first_q, first_q + queries), slice(first_k, first_k + min(queries, keys))
            lengths = replace(state, query_lens=(queries,), kv_lens=(min(queries, keys),))
            parts = {"q": q[rows], "k": k[seen], "v": v[seen], "out": out[rows], "lse": lse[rows]}
            super().__call__(lengths, softmax_scale=tensors["softmax_scale"], **parts)
            first_q, first_k = first_q + queries, first_k + keys


EXPANDED_MUTANTS = [ExpandedHeadOff, Unmasked, EarlyKeys]


@pytest.mark.parametrize("mutant", EXPANDED_MUTANTS)
def test_the_op_check_fails_a_wrong_expanded_attention(check_expanded: Any, mutant: type) -> None:
    check_expanded(Expanded())
    with pytest.raises(AssertionError, match=FAILS):
        check_expanded(mutant())


@pytest.mark.parametrize("mutant", EXPANDED_MUTANTS)
def test_the_layer_check_fails_a_wrong_expanded_attention(check_layer: Any, mutant: type) -> None:
    with pytest.raises(AssertionError, match=FAILS):
        check_layer(ops={"mutant": mutant()}, attention="expanded")


class LateQuery(Rotate):  # type: ignore[misc, valid-type]
    """Queries are rotated one position too far."""

    def __init__(self, step: torch.Tensor) -> None:
        self.step = step  # [r], the angles of position 1

    def __call__(self, **tensors: Any) -> None:
        super().__call__(**tensors)
        cos_sin = self.step.expand(tensors["x"].shape[0], -1)
        super().__call__(**{**tensors, "x": tensors["out"], "cos_sin": cos_sin})


class UnrotatedKey(Write):  # type: ignore[misc, valid-type]
    """The new shared key is cached as projected."""

    def __call__(self, **tensors: Any) -> None:
        still = torch.zeros_like(tensors["cos_sin"])
        still[:, : still.shape[1] // 2] = 1
        super().__call__(**{**tensors, "cos_sin": still})


class UnnormedLatent(Write):  # type: ignore[misc, valid-type]
    """The latent is cached without its norm's weight."""

    def __call__(self, **tensors: Any) -> None:
        super().__call__(**{**tensors, "weight": torch.ones_like(tensors["weight"])})


@pytest.mark.parametrize("mutant", [UnrotatedKey, UnnormedLatent])
@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_the_layer_check_fails_a_wrong_cache_write(check_layer: Any, mutant: type, attention: str) -> None:
    with pytest.raises(AssertionError, match=FAILS):
        check_layer(ops={"mutant": mutant()}, attention=attention)


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_the_layer_check_fails_queries_one_position_late(check_layer: Any, tiny: Any, attention: str) -> None:
    step = RotaryTable(tiny(), torch.device("cpu"), size=2).table[1]
    with pytest.raises(AssertionError, match=FAILS):
        check_layer(ops={"mutant": LateQuery(step)}, attention=attention)


class PlainScale(MLAConfig):
    """The YaRN factor on the softmax scale is forgotten."""

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5)


class OnceScale(MLAConfig):
    """The YaRN magnitude is applied once instead of squared."""

    @property
    def softmax_scale(self) -> float:
        assert self.rope_scaling is not None
        return float(self.qk_head_dim**-0.5 * self.rope_scaling.softmax_factor() ** 0.5)


def as_class(cls: type[MLAConfig]) -> Callable[[MLAConfig], MLAConfig]:
    return lambda config: cls(**{field.name: getattr(config, field.name) for field in fields(MLAConfig)})


CONFIG_MUTANTS: dict[str, Callable[[MLAConfig], MLAConfig]] = {
    "mscale forgotten": as_class(PlainScale),
    "mscale applied once": as_class(OnceScale),
    "rope half-split": lambda config: replace(config, rope_interleave=False),
    "eps 1e-5": lambda config: replace(config, rms_norm_eps=1e-5),
    "yarn ignored": lambda config: as_class(SameScale)(replace(config, rope_scaling=None)),
    "theta": lambda config: replace(config, rope_theta=50000.0),
}


class SameScale(MLAConfig):
    """Plain frequencies, with the scale that YaRN would have given."""

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5 * (0.0707 * torch.tensor(40.0).log().item() + 1) ** 2)


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("mutant", CONFIG_MUTANTS)
def test_the_layer_check_fails_a_layer_of_another_config(
    check_layer: Any, mutant: str, attention: str
) -> None:
    with pytest.raises(AssertionError, match=FAILS):
        check_layer(CONFIG_MUTANTS[mutant], attention=attention)
