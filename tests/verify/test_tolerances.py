"""The criterion itself: what it lets pass and what it does not, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mla.verify import tolerances
from mla.verify.places import Places
from mla.verify.tolerances import judge_lse, row_errors, same_bits

BF16 = torch.bfloat16


def judge(
    result: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor, *how: Any, **words: Any
) -> tuple[float, str]:
    return tolerances.judge(result, truth, row_errors(reference, truth), *how, **words)


def off(truth: torch.Tensor, error: float, row: int | slice = slice(None)) -> torch.Tensor:
    """Return truth with a relative error in one row, or in all."""
    rounded = truth.clone()
    rounded[row] *= 1 + error
    return rounded


@pytest.fixture
def truth() -> torch.Tensor:
    return torch.randn(50, 16, 64, generator=torch.Generator().manual_seed(0)).double()


def test_the_reference_may_be_as_wrong_again(truth: torch.Tensor) -> None:
    reference = off(truth, 1e-2, 7)
    assert judge(off(truth, 1.9e-2, 7), truth, reference, BF16)[1] == ""
    assert "1 of 50" in judge(off(truth[:, 0], 2.1e-2, 7), truth[:, 0], reference[:, 0], BF16)[1]
    assert judge(off(truth, 1.9e-2, 8), truth, reference, BF16)[1], "another row's error is no excuse"


def test_one_head_of_one_token_that_is_5_percent_off_is_found(truth: torch.Tensor) -> None:
    output = truth.clone()
    output[3, 5] *= 1.05
    ratio, reason = judge(output, truth, truth, BF16)
    assert ratio > 9
    assert "1 of 800 rows are wrong; row 3, head 5 has relative error 5.0e-02" in reason
    places = Places.new_tokens((1,) * 50, range(1, 51))
    assert "wrong; request 3, position 3, head 5 (row 3) has" in judge(output, truth, truth, BF16, places)[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_wrong(truth: torch.Tensor, value: float) -> None:
    output = truth.clone()
    output[3, 5, 0] = value
    assert judge(output, truth, truth, BF16) == (math.inf, "1 of 800 rows hold NaN or infinity")
    assert judge(output[:3], truth, truth, BF16)[1] == "shape [3, 16, 64] instead of [50, 16, 64]"


def test_an_output_that_is_all_nan_was_not_written(truth: torch.Tensor) -> None:
    unwritten = "it was probably not written: all 800 rows are NaN, as before the call"
    output = torch.full_like(truth, math.nan)
    assert judge(output, truth, truth, BF16)[1] == unwritten
    output[7:] = truth[7:]
    places = Places.new_tokens((1,) * 50, range(1, 51))
    assert judge(output, truth, truth, BF16, places)[1] == (
        "112 of 800 rows hold NaN or infinity: request 0, position 0, head 0 (row 0); "
        "every row of requests 0..6"
    )


def test_a_row_where_the_reference_is_lucky_may_err_as_rows_do(truth: torch.Tensor) -> None:
    """Large logits: the reference errs by more than the floor, but not in every row."""
    reference, output = off(truth, 1e-4), off(truth, 1e-4)
    reference[7] = truth[7]
    assert judge(output, truth, reference, torch.float32)[1] == ""
    output[7] = off(truth, 2.9e-4)[7]
    assert judge(output, truth, reference, torch.float32)[1] == ""
    output[7] = off(truth, 3.3e-4)[7]
    assert "row 7, head" in judge(output, truth, reference, torch.float32)[1]


def test_no_right_op_is_refused_in_fp32() -> None:
    """Products summed in another order, in many tiny problems: far from the bound in each."""
    worst = 0.0
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(rows, 40, generator=random) for rows in (1 + seed % 24, 8 + seed % 5))
        by_parts = sum(a @ b.T for a, b in zip(x.split(8, 1), weight.split(8, 1), strict=True))
        assert isinstance(by_parts, torch.Tensor)
        worst = max(worst, judge(by_parts, x.double() @ weight.double().T, x @ weight.T, torch.float32)[0])
    assert worst < 0.2


def test_a_row_of_zeros_must_be_zero(truth: torch.Tensor) -> None:
    truth[3] = 0
    assert judge(truth, truth, truth, BF16)[1] == ""
    output = truth.clone()
    output[3, 0, 0] = 1e-30
    assert judge(output, truth, truth, BF16)[1]


def test_nothing_is_right() -> None:
    empty = torch.empty(0, 4, 8)
    assert judge(empty, empty.double(), empty, BF16) == (0.0, "")
    assert judge_lse(empty[..., 0], empty[..., 0].double(), BF16) == (0.0, "")


def test_a_log_sum_exp_is_judged_by_its_size() -> None:
    lse = torch.tensor([[0.5, -torch.inf, 2000.0]])
    for dtype, bound in ((BF16, 1e-3), (torch.float32, 2e-5)):
        assert judge_lse(lse, lse.double(), dtype)[1] == ""
        assert judge_lse(lse + 0.9 * bound, lse.double(), dtype)[1] == ""
        assert judge_lse(lse + 1.1 * bound, lse.double(), dtype)[1]
        assert judge_lse(lse * (1 + 0.9 * bound), lse.double(), dtype)[1] == ""


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 0.0, -1e30])
def test_an_empty_row_has_minus_infinity_and_nothing_else(value: float) -> None:
    ratio, reason = judge_lse(torch.tensor([[value]]), torch.tensor([[-torch.inf]]).double(), BF16)
    assert ratio == math.inf
    assert "where the natural logarithm is -inf" in reason


def test_a_wrong_log_sum_exp_is_named() -> None:
    lse = torch.zeros(3, 4)
    lse[1:, 2] = 0.7
    places = Places.new_tokens((1, 2), (9, 5))
    assert judge_lse(lse, torch.zeros(3, 4).double(), BF16, places)[1] == (
        "0.7 where the natural logarithm is 0 at request 1, position 3, head 2 (row 1); "
        "head 2 of every row of request 1; 2 of 12 are wrong"
    )


def test_a_log_sum_exp_is_fp32() -> None:
    lse = torch.ones(2, 3)
    assert judge_lse(lse.half(), lse.double(), BF16)[1] == "dtype torch.float16 instead of torch.float32"
    assert judge_lse(lse.T, lse.double(), BF16)[1] == "shape [3, 2] instead of [2, 3]"


def test_bits_are_compared_and_not_values() -> None:
    nan = torch.tensor([torch.nan, 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([torch.nan, -0.0]))
    assert same_bits(nan[::2], torch.tensor([torch.nan]))
