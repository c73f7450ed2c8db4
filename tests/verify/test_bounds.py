"""The rule: what one row may err by, what many may, and what the reference has to do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mla.verify import tolerances
from mla.verify.layer_check import Checker
from mla.verify.tolerances import (
    ALLOWED,
    UNITS,
    layer_bounds,
    op_bounds,
    row_errors,
    shrinkage,
    table_decides,
)

BF16, F32 = torch.bfloat16, torch.float32
# u, the largest relative error of rounding a number once.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
Even = Callable[[int, int], torch.Tensor]


def judge(
    result: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor, *how: Any, **words: Any
) -> tuple[float, str]:
    return tolerances.judge(result, truth, row_errors(reference, truth), *how, **words)


@pytest.fixture
def even() -> Even:
    """Return a function that makes rows of norm 1."""

    def make(rows: int, width: int = 4096) -> torch.Tensor:
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return x / x.norm(dim=-1, keepdim=True)

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 512])
def test_the_table_is_what_rounding_costs(dtype: torch.dtype, width: int, even: Even) -> None:
    truth = even(4000, width)
    once = (truth.to(dtype).double() - truth).norm() / truth.norm()
    assert once.item() == pytest.approx(ALLOWED[dtype].op, rel=0.1)
    assert ALLOWED[dtype].layer == pytest.approx(3**0.5 * ALLOWED[dtype].op, rel=0.02)


def test_the_table_is_what_the_worst_order_of_a_long_sum_costs() -> None:
    """One accumulator for 2^12 and 2^14 terms, of which 2^16 is the extrapolation."""
    errors = []
    for terms in (2**12, 2**14):
        x = torch.randn(terms, 400, generator=torch.Generator().manual_seed(0))
        total = torch.zeros(400)
        for row in x:
            total += row
        truth = x.double().sum(0)
        errors.append(((total - truth).norm() / truth.norm()).item())
    assert errors[1] / errors[0] == pytest.approx(2, rel=0.2)
    assert ALLOWED[F32].op == pytest.approx(2 * errors[1], rel=0.3)


@pytest.mark.parametrize("dtype", UNITS)
def test_any_number_rounded_once_is_right(dtype: torch.dtype) -> None:
    """Rows of one number, in all places between two powers of two."""
    truth = torch.linspace(1, 2, 5001, dtype=torch.float64)[:, None]
    ratio, reason = judge(truth.to(dtype), truth, truth, dtype)
    assert (ratio < 1, reason) == (True, "")
    assert op_bounds(torch.zeros(1), truth[:1], dtype).rows.item() > ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", UNITS)
def test_a_row_may_err_more_than_many_do(dtype: torch.dtype, even: Even) -> None:
    truth = even(10_000, 64)
    for error, right in ((2.9, True), (3.3, False)):
        output = truth.clone()
        output[7] *= 1 + error * UNITS[dtype]
        assert (judge(output, truth, truth, dtype)[1] == "") is right
    for error, right in ((1.9, True), (2.1, False)):
        assert (judge(truth * (1 + error * UNITS[dtype]), truth, truth, dtype)[1] == "") is right


def test_few_rows_may_err_more_than_many(even: Even) -> None:
    """Of all rows, one may be as wrong as a row may."""
    wholes = []
    for count in (1, 4, 100, 10_000):
        bounds = op_bounds(torch.zeros(count), even(count, 64), BF16)
        wholes.append(bounds.of_whole(bounds.rows, torch.ones(count, dtype=torch.float64)))
    row = bounds.rows[0].item()
    expected = [(bounds.many**2 + row**2 / count) ** 0.5 for count in (1, 4, 100, 10_000)]
    assert wholes == pytest.approx(expected)
    assert wholes[-1] == pytest.approx(2 * UNITS[BF16], rel=0.01)
    large = torch.ones(100, dtype=torch.float64)
    large[7] = 100.0
    assert bounds.of_whole(bounds.rows[:100], large) > 0.9 * row, "a row that is most of the whole"


def test_rows_that_repeat_err_alike(even: Even) -> None:
    """All heads that see one key have its values: what one of them may err by, all may."""
    off = 1 + 2.4 * UNITS[BF16]  # less than a row may be off by, and more than the whole of many
    one, many = even(1, 64), even(100, 64)
    same = one.expand(100, 64)
    assert judge(one * off, one, one, BF16)[1] == judge(same * off, same, same, BF16)[1] == ""
    assert "of the whole" in judge(many * off, many, many, BF16)[1]


def test_what_the_reference_errs_in_a_row_is_added_to_what_others_may(even: Even) -> None:
    errors = torch.tensor([0.0, 1e-2, 0.0], dtype=torch.float64).repeat(100)
    rows = op_bounds(errors, even(300), BF16).rows
    typical = 1e-2 / 3**0.5
    assert rows[0].item() == pytest.approx(3 * typical, rel=1e-3)
    assert rows[1].item() == pytest.approx(2 * (1e-4 + (1.5 * typical) ** 2) ** 0.5, rel=1e-3)


def test_a_narrow_row_that_cancels_may_err_more_and_a_wide_one_hardly() -> None:
    def bound(width: int) -> float:
        truth = torch.ones(50, width, dtype=torch.float64)
        truth[3] /= 4
        rows = op_bounds(torch.zeros(50), truth, BF16).rows
        return (rows[3] / rows[0]).item()

    assert bound(8) > 2
    assert bound(512) < 1.1
    assert bound(8) < 4, "no more than the absolute error of the others"


def test_large_logits_cost_precision_in_float32(even: Even) -> None:
    truth, lse = even(40), torch.full((40,), 400.0)
    output = truth.clone()
    output[3] *= 1 + 1e-4
    assert judge(output, truth, truth, F32)[1]
    assert judge(output, truth, truth, F32, lse=lse)[1] == ""
    assert judge(output, truth, truth, F32, lse=lse / 40)[1]
    assert judge(output, truth, truth, F32, lse=-lse)[1] == "", "of either sign"
    lse[7] = -torch.inf
    assert judge(truth, truth, truth, F32, lse=lse) == (0.0, "")


def test_a_layer_in_float32_needs_no_reference(even: Even) -> None:
    truth = even(40)[None]

    def never() -> torch.Tensor:
        raise AssertionError

    checker = Checker(truth, F32, never)
    for error, status in ((0.9e-5, "ok"), (1.5e-5, "wrong")):
        assert checker.check(truth * (1 + error), held_to_reference=True).status == status
    assert [dtype for dtype in ALLOWED if table_decides(dtype)] == [F32]


@pytest.mark.parametrize("lucky", [True, False])
def test_a_row_of_a_layer_may_err_like_one_number(even: Even, lucky: bool) -> None:
    """In many rows of a layer one logit decides. The reference may be lucky in such a row, or not."""
    truth, typical = even(400), ALLOWED[BF16].layer
    reference, outputs = truth * (1 + typical), truth * (1 + typical)
    reference[7] = truth[7] * (1 if lucky else 1 + 5 * typical)
    checker = Checker(truth[None], BF16, lambda: reference[None])
    for error, status in ((4.5, "ok"), (12.0, "wrong")):
        outputs[7] = truth[7] * (1 + error * typical)
        assert checker.check(outputs[None], held_to_reference=True).status == status


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("error", [0.0, 1.0])
def test_no_row_of_a_layer_may_exceed_the_table(dtype: torch.dtype, error: float, even: Even) -> None:
    bounds = layer_bounds(torch.full((9,), error, dtype=torch.float64), even(9), dtype)
    cap = 2 * ALLOWED[dtype].whole
    assert bounds.rows.max() <= cap
    assert bounds.many <= ALLOWED[dtype].whole


@pytest.mark.parametrize("dtype", ALLOWED)
def test_subnormal_results_may_be_rounded(dtype: torch.dtype, even: Even) -> None:
    info = torch.finfo(dtype)
    truth = even(50, 64) * info.smallest_normal * info.eps * 16
    assert judge(truth.to(dtype), truth, truth, dtype)[1] == ""
    assert judge(truth.to(dtype) * 2, truth, truth, dtype)[1]


@pytest.mark.parametrize("dtype", ALLOWED)
def test_rows_that_must_be_zero_are_judged(dtype: torch.dtype) -> None:
    """A batch in which nobody sees a key: nothing else is left to compare with."""
    zeros = torch.zeros(3, 2, 8)
    assert judge(zeros.to(dtype), zeros.double(), zeros.to(dtype), dtype) == (0.0, "")
    output = zeros.to(dtype, copy=True)
    output[1, 0, 3] = 1e-3
    assert judge(output, zeros.double(), zeros.to(dtype), dtype)[0] > 1


def test_a_wide_row_is_not_small_by_chance(even: Even) -> None:
    """Among rows 1000 times as large, a wide one may err no more than alone; one number may cancel."""
    for width, most in ((512, 1.02), (128, 1.1), (1, 1e4)):
        truth = torch.cat((1e3 * even(50, width), even(1, width)))
        errors = torch.zeros(51, dtype=torch.float64)
        alone = op_bounds(errors[:1], truth[-1:], BF16).rows[-1]
        assert 1 <= op_bounds(errors, truth, BF16).rows[-1] / alone < most
    drawn = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(0)).square().mean(1)
    assert drawn.min() > 1 / shrinkage(4)
