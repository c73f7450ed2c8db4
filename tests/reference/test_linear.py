"""The reference projections against float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_inputs import DTYPES, ROUNDING, draw

from mla.reference import REFERENCE
from mla.reference import small as linear


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
@pytest.mark.parametrize("in_place", [False, True])
def test_batched_linear_applies_each_heads_own_weight(
    assert_rows_close: Any, dtype: torch.dtype, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "writes_in_place", lambda device, dtype: in_place)
    op, x, weight = (
        REFERENCE["batched_linear"],
        draw(5, 3, 12, dtype=dtype),
        draw(3, 7, 12, dtype=dtype, seed=1),
    )
    wide = torch.full((5, 3, 9), torch.nan, dtype=dtype)
    out = wide[..., 1:8]
    op(op.pack(weight), x=x, out=out)
    truth = torch.stack([x[:, h].double() @ weight[h].double().T for h in range(3)], dim=1)
    assert_rows_close(out, truth, 2 * ROUNDING[dtype])
    assert wide[..., [0, 8]].isnan().all()


Bmm = Callable[..., torch.Tensor]


def refuses(bmm: Bmm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    raise RuntimeError("out must be contiguous")


def warns(bmm: Bmm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    warnings.warn("An output with one or more elements was resized", UserWarning, stacklevel=2)
    bmm(x, weight, out=out)


def leaves_it(bmm: Bmm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    bmm(x, weight)


def ignores_strides(bmm: Bmm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    made = bmm(x, weight)
    out.as_strided(made.shape, made.stride()).copy_(made)


STACKS = {"refuses": refuses, "warns": warns, "leaves it": leaves_it, "ignores strides": ignores_strides}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_that_writes_slices_is_recognised(dtype: torch.dtype) -> None:
    assert linear.serves_slices(torch.device("cpu"), dtype)
    assert not linear.writes_in_place(torch.device("cpu"), dtype)  # it could, and would not gain by it


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_that_does_not_keeps_its_copy(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bmm = torch.bmm

    def other(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
        return bmm(x, weight) if out is None else STACKS[stack](bmm, x, weight, out)

    monkeypatch.setattr(torch, "bmm", other)
    assert not linear.serves_slices(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kind", ["linear", "batched_linear"])
def test_packing_returns_the_weight_bit_for_bit(kind: str) -> None:
    weight = draw(3, 7, 12, dtype=torch.bfloat16)
    op = REFERENCE[kind]
    assert torch.equal(op.unpack(op.pack(weight)), weight)
