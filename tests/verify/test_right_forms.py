"""No false alarm: right arithmetic in any order stays well below the bounds, and wrong arithmetic does not.

`python -m benchmarks.rounding.seeds` does the same with hundreds of seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.rounding.cases import (
    ATTENTION,
    LAYERS,
    LONG_CONTEXT,
    layer_ratio,
    new_ratio,
    op_ratio,
    product_ratio,
)
from benchmarks.rounding.forms import ONE_BY_ONE, RIGHT, WRONG, Form

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PREFILL, ALIKE, DECODE, ONE_TOKEN, WIDE = LAYERS
WELL_BELOW = 0.9  # thousands of seeds come nearer than tens


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def forms(dtype: torch.dtype) -> list[Form]:
    return [form for form in RIGHT if dtype == torch.float32 or form is not ONE_BY_ONE]


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_layers_with_few_rows(dtype: torch.dtype) -> None:
    for seed in range(8):
        for layer in (DECODE, ONE_TOKEN):
            case = layer.drawn(dtype, seed)
            ratios = {form.name: layer_ratio(case, form) for form in forms(dtype)}
            assert max(ratios.values()) < WELL_BELOW, (layer.name, seed, ratios)
            assert new_ratio(case) < WELL_BELOW, (layer.name, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_layers_with_hundreds_of_rows(dtype: torch.dtype) -> None:
    """Also where one key decides many rows, which then err several times as much as the whole."""
    for layer, seed in ((PREFILL, 0), (PREFILL, 1), (ALIKE, 0), (ALIKE, 1)):
        case = layer.drawn(dtype, seed)
        ratios = {form.name: layer_ratio(case, form) for form in forms(dtype)[:4]}
        assert layer is ALIKE or new_ratio(case) < WELL_BELOW, seed
        assert max(ratios.values()) < WELL_BELOW, (layer.name, seed, ratios)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_layer_of_the_widths_of_deepseek_v2_lite(dtype: torch.dtype) -> None:
    case = WIDE.drawn(dtype, 0)
    assert max(layer_ratio(case, form) for form in forms(dtype)[:3]) < WELL_BELOW


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_ops(dtype: torch.dtype) -> None:
    for seed in range(8):
        for name, case in ATTENTION.items():
            ratios = {form.name: op_ratio(case, form, dtype, seed) for form in forms(dtype)}
            assert max(ratios.values()) < WELL_BELOW, (name, seed, ratios)
        assert max(product_ratio(form, dtype, seed) for form in forms(dtype)) < WELL_BELOW, seed


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form, dtypes in WRONG for dtype in dtypes],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_wrong_arithmetic_is_found(form: Form, dtype: torch.dtype) -> None:
    for seed in range(3):
        in_layer, alone = layer_ratio(DECODE.drawn(dtype, seed), form), 0.0
        if in_layer <= 1:
            alone = op_ratio(LONG_CONTEXT, form, dtype, seed)
        assert max(in_layer, alone) > 1, seed


def test_narrow_arithmetic_in_a_float32_layer_is_far_outside() -> None:
    for form, dtypes in WRONG:
        if torch.float32 in dtypes:
            assert layer_ratio(DECODE.drawn(torch.float32, 0), form) > 5, form.name
