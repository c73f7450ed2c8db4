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
    LONG,
    AttentionProblem,
    LayerProblem,
    product_ratio,
)
from benchmarks.rounding.forms import ONE_BY_ONE, RIGHT, Form
from benchmarks.rounding.wrong import WRONG

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
        for case in (DECODE, ONE_TOKEN):
            problem = LayerProblem(case, dtype, seed)
            found = {form.name: problem.ratio(form) for form in forms(dtype)}
            assert max(found.values()) < WELL_BELOW, (case.name, seed, found)
            assert problem.new_ratio() < WELL_BELOW, (case.name, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_layers_with_hundreds_of_rows(dtype: torch.dtype) -> None:
    """Also where one key decides many rows, which then err several times as much as the whole."""
    for case, seed in ((PREFILL, 0), (PREFILL, 1), (ALIKE, 0), (ALIKE, 1)):
        problem = LayerProblem(case, dtype, seed)
        found = {form.name: problem.ratio(form) for form in forms(dtype)[:4]}
        assert max(found.values()) < WELL_BELOW, (case.name, seed, found)
        assert case is ALIKE or problem.new_ratio() < WELL_BELOW, seed


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_layer_of_the_widths_of_deepseek_v2_lite(dtype: torch.dtype) -> None:
    problem = LayerProblem(WIDE, dtype, 0)
    assert max(problem.ratio(form) for form in forms(dtype)[:3]) < WELL_BELOW


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_ops(dtype: torch.dtype) -> None:
    for seed in range(8):
        for case in ATTENTION:
            problem = AttentionProblem(case, dtype, seed)
            found = {form.name: problem.ratio(form) for form in forms(dtype)}
            assert max(found.values()) < WELL_BELOW, (case.name, seed, found)
        assert max(product_ratio(form, dtype, seed) for form in forms(dtype)) < WELL_BELOW, seed


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form, dtypes in WRONG for dtype in dtypes],
    ids=lambda one: getattr(one, "name", str(one)),
)
def test_wrong_arithmetic_is_found(form: Form, dtype: torch.dtype) -> None:
    for seed in range(3):
        in_layer, alone = LayerProblem(DECODE, dtype, seed).ratio(form), 0.0
        if in_layer <= 1:
            alone = AttentionProblem(LONG, dtype, seed).ratio(form)
        assert max(in_layer, alone) > 1, seed


def test_narrow_arithmetic_in_a_float32_layer_is_far_outside() -> None:
    for form, dtypes in WRONG:
        if torch.float32 in dtypes:
            assert LayerProblem(DECODE, torch.float32, 0).ratio(form) > 5, form.name
