"""The check against the oracle: what it lets pass and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import torch

from mla.bench.subjects.inputs import make_inputs
from mla.bench.workload.scenario import Scenario
from mla.verify import layer_check
from mla.verify.layer_check import Checker, Forward
from mla.verify.places import Places
from mla.verify.tolerances import BOUNDS, row_errors

if TYPE_CHECKING:
    from mla import MLAConfig

SHAPE = (3, 5, 64)  # inputs, tokens, hidden


@pytest.fixture
def expected() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def checker(expected: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Checker:
    """Return a checker whose reference is the expected output, rounded."""
    return Checker(expected, dtype, lambda: expected.to(dtype))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("ours", [True, False])
def test_rounded_outputs_pass(expected: torch.Tensor, dtype: torch.dtype, ours: bool) -> None:
    result = checker(expected, dtype).check(expected.to(dtype), ours)
    assert (result.status, result.reason) == ("ok", "")
    assert result.error_ratio is not None
    assert 0 < result.error_ratio <= 1


def test_nothing_to_judge_is_not_right(expected: torch.Tensor) -> None:
    result = checker(expected).check_forwards([], False)
    assert (result.status, result.reason) == ("wrong", "there are no outputs to judge")


@pytest.mark.parametrize("ours", [True, False])
def test_one_exchanged_token_is_caught_and_named(expected: torch.Tensor, ours: bool) -> None:
    outputs = expected.clone()
    outputs[2, 3] = expected[2, 4]
    result = checker(expected).check(outputs.bfloat16(), ours)
    assert result.status == "wrong"
    assert result.reason.startswith("1 of 15 output rows are too far from the oracle; ")
    assert "worst is token 3 of step 2 with relative error 1." in result.reason


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_one_row_off_by_five_percent_is_caught(expected: torch.Tensor, dtype: torch.dtype) -> None:
    """5% in one of 15 rows is about 1.3% of the whole, which a bound on the whole would let pass in bf16."""
    outputs = expected.clone()
    outputs[1, 0] *= 1.05
    for ours in (True, False):
        result = checker(expected, dtype).check(outputs.to(dtype), ours)
        assert result.status == "wrong"
        assert "worst is token 0 of step 1 with relative error 5.0e-02" in result.reason


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_caught(expected: torch.Tensor, bad: float) -> None:
    outputs = expected.bfloat16()
    outputs[0, 4, 7] = bad
    result = checker(expected).check(outputs, held_to_reference=True)
    assert (result.status, result.error_ratio) == ("wrong", None)
    assert result.reason == "1 of 15 output rows hold NaN or infinity; the first is token 4 of step 0"


def test_ours_is_held_to_twice_the_reference_and_others_to_the_table(expected: torch.Tensor) -> None:
    outputs = expected * 1.01  # within 2e-2, far from twice the rounding error
    assert checker(expected).check(outputs, held_to_reference=False).status == "ok"
    assert checker(expected).check(outputs, held_to_reference=True).status == "wrong"


def test_a_bad_reference_does_not_excuse_ours(expected: torch.Tensor) -> None:
    lenient = Checker(expected, torch.bfloat16, lambda: expected * 2)
    assert lenient.check(expected * 1.05, held_to_reference=True).status == "wrong"


def test_inputs_follow_the_seed_and_are_random_in_every_channel(tiny: Callable[..., MLAConfig]) -> None:
    scenario = Scenario(name="d", mode="decode", query_lens=(1, 1), history=(9, 0), runs=4)
    first, again, other = (make_inputs(tiny(), scenario, seed, torch.bfloat16) for seed in (1, 1, 2))
    assert torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.hidden, other.hidden)
    assert torch.equal(first.history[0][0], again.history[0][0])
    assert bool((first.hidden.float().std(dim=(0, 1)) > 0).all())
    assert [tuple(kv.shape) for kv, _ in first.history] == [(9, 32), (0, 32)]
    assert len({step.numpy(force=True).tobytes() for step in first.hidden.float()}) == 4


def test_wrong_rows_are_named_by_what_they_are_and_have_in_common(expected: torch.Tensor) -> None:
    places = Places.new_tokens((2, 3), (6, 3), torch.tensor([[7, 5], [2, 0]]), page_size=4)
    output = expected[1].clone()
    output[2:] *= 1.05
    output[3] *= 2
    forward = Forward(1, output, expected[1], "step 1", lambda: places)
    reason = checker(expected).check_forwards([forward], held_to_reference=False).reason
    assert reason.startswith(
        "3 of 5 output rows are too far from the oracle; worst is request 1, position 1 (row 3; "
    )
    assert " page 2, slot 1) of step 1 with relative error 1.1e+00; every row of request 1" in reason
    output[1] = torch.nan
    reason = checker(expected).check_forwards([forward], held_to_reference=False).reason
    assert "; the first is request 0, position 5 (row 1; page 5, slot 1) of step 1" in reason


@pytest.mark.parametrize("ours", [True, False])
def test_the_reference_runs_once_and_only_for_ours(
    expected: torch.Tensor, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass is checked, and its errors are float64 over all inputs."""
    rows, reference = Mock(wraps=row_errors), Mock(return_value=expected.bfloat16())
    monkeypatch.setattr(layer_check, "row_errors", rows)
    judge = Checker(expected, torch.bfloat16, reference)
    checks = [judge.check(expected * 1.001, ours) for _ in range(3)]
    assert rows.call_count == reference.call_count == ours
    assert checks == checks[:1] * 3
