"""The reference projections against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import DTYPES, ROUNDING, draw

from mla.reference import REFERENCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_matrix_product_plus_bias(assert_rows_close: Any, dtype: torch.dtype, bias: bool) -> None:
    op, x, weight = REFERENCE["linear"], draw(5, 12, dtype=dtype), draw(7, 12, dtype=dtype, seed=1)
    shift = draw(7, dtype=dtype, seed=2) if bias else None
    out = torch.full((5, 7), torch.nan, dtype=dtype)
    op(op.pack(weight), x=x, bias=shift, out=out)
    truth = x.double() @ weight.double().T + (shift.double() if bias else 0)
    assert_rows_close(out, truth, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_linear_applies_each_heads_own_weight(assert_rows_close: Any, dtype: torch.dtype) -> None:
    op, x, weight = (
        REFERENCE["batched_linear"],
        draw(5, 3, 12, dtype=dtype),
        draw(3, 7, 12, dtype=dtype, seed=1),
    )
    out = torch.full((5, 3, 7), torch.nan, dtype=dtype)
    op(op.pack(weight), x=x, out=out)
    truth = torch.stack([x[:, h].double() @ weight[h].double().T for h in range(3)], dim=1)
    assert_rows_close(out, truth, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("kind", ["linear", "batched_linear"])
def test_packing_returns_the_weight_bit_for_bit(kind: str) -> None:
    weight = draw(3, 7, 12, dtype=torch.bfloat16)
    op = REFERENCE[kind]
    assert torch.equal(op.unpack(op.pack(weight)), weight)
