"""The rule: what one row may err by, what many may, and what the reference has to do with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mla.cache.formats import codec_of
from mla.verify import tolerances
from mla.verify.layer_check import Checker
from mla.verify.places import Places
from mla.verify.stored import judge_bytes, stored_truth
from mla.verify.tolerances import (
    ALLOWED,
    UNITS,
    judge_lse,
    layer_bounds,
    op_bounds,
    row_errors,
    same_bits,
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


# ----------------------------------------------------------------------------------------------- what is said


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


def test_a_byte_is_not_certain_because_it_returns_after_as_many_codes() -> None:
    """Numbers next to the true one differ by 8 codes of fp16, and in one byte of float32 not at all."""
    codec = codec_of("fp32", 1, 2)
    assert codec is not None
    latent, key = torch.ones(1, 1), torch.tensor([[0.00016614003106951714, 2.001847763895057]]).double()
    right = stored_truth(latent.double(), key, codec, torch.float16)["bytes"]
    for number, wrong in ((0.00016605854, False), (0.0106, True)):
        key[0, 0] = number
        row = codec.encode(latent, key.half().float())
        assert bool(judge_bytes(row, right, None)[1]) is wrong
