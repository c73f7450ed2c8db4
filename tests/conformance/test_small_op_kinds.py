"""Small ops that fail as kernels do, by kind of failure, each bug with several numbers: all must be found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrong_ops import habits, places
from wrong_ops.base import FORMULAS, SMALL_OPS
from wrong_ops.by_kind import BF16, FP16, FP32, KINDS, Make

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
CASES = [
    pytest.param(kind, check, make, id=f"{check}-{name}")
    for kind, mutants in KINDS.items()
    for check, make, name in mutants
]


def failures(results: list[CheckResult]) -> dict[str, str]:
    return {one.check: one.reason for one in results if one.of == "mine" and one.status == "fail"}


@pytest.mark.parametrize(("kind", "check", "make"), CASES)
def test_a_bug_is_found_by_the_check_of_its_kind(
    judge: Run, sound: Any, kind: str, check: str, make: Make
) -> None:
    dtype = BF16 if kind == "numbers" else FP32
    found = failures(judge(sound(ops={"mine": make()}), f"{check}[mine-*]", dtypes=(dtype,)))
    assert set(found) == {check}
    assert "raised" not in found[check]
    assert {one.fails for one in all_checks() if one.id == check} == {kind}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("share", [2e-3, 1e-3])
@pytest.mark.parametrize("kind", SMALL_OPS)
def test_a_trace_of_the_call_before_shows_in_narrow_dtypes(
    judge: Run, sound: Any, kind: str, share: float, dtype: torch.dtype
) -> None:
    backend = sound(ops={"mine": habits.adds_previous(kind, share)})
    assert set(failures(judge(backend, f"{kind}.call_before[mine-*]", dtypes=(dtype,)))) == {
        f"{kind}.call_before"
    }


@pytest.mark.parametrize("kind", SMALL_OPS)
def test_an_empty_launch_that_raises_fails_and_names_what_it_raised(
    judge: Run, sound: Any, kind: str
) -> None:
    found = failures(judge(sound(ops={"mine": places.fails_empty(kind)}), f"{kind}.empty[mine-*]"))
    assert "raised RuntimeError: invalid configuration argument" in found[f"{kind}.empty"]


def test_every_check_has_two_mutants() -> None:
    counts = Counter(str(case.values[1]) for case in CASES)
    assert set(counts) == {one.id for one in all_checks() if one.kind in SMALL_OPS} - FORMULAS
    assert min(counts.values()) > 1
