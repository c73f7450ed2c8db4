"""The kernels of the small ops, against float64, in poisoned memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_problems.small import NormProblem, RotationProblem, WriteProblem

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PROBLEMS = (
    NormProblem(1, 1536),
    NormProblem(5, 100),
    *(RotationProblem(3, heads, interleaved=way) for heads in (1, 20, 128) for way in (True, False)),
    RotationProblem(2, 3, width=24),
    RotationProblem(2, 3, width=24, interleaved=False),
    RotationProblem(2, 40, in_place=True),
    RotationProblem(2, 40, in_place=True, interleaved=False),
    WriteProblem(9),
    WriteProblem(9, interleaved=False),
    WriteProblem(3, latent=100, rope=8),
    WriteProblem(3, latent=256, rope=24, interleaved=False),
    WriteProblem(3, rope=0),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_right_and_nothing_else_touched(problem: Any, dtype: torch.dtype) -> None:
    assert replace(problem, dtype=dtype).wrong() == []
