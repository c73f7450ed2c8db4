"""The kernels of the small ops, against float64, in poisoned memory."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import KernelCase, norm, rotation, write

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = (
    norm(1, 1536),
    norm(5, 100),
    *(rotation(3, heads, interleaved=way) for heads in (1, 20, 128) for way in (True, False)),
    rotation(2, 3, width=24),
    rotation(2, 40, in_place=True),
    rotation(2, 40, in_place=True, interleaved=False),
    *(rotation(3, heads, interleaved=way, joined=True) for heads in (1, 40) for way in (True, False)),
    rotation(2, 40, in_place=True, joined=True),
    write(9),
    write(3, latent=100, rope=8),
    write(3, latent=256, rope=24, interleaved=False),
    write(3, rope=0),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_and_nothing_else_touched(case: KernelCase, dtype: torch.dtype) -> None:
    assert case.but(dtype=dtype).wrong() == []
