"""Stacks whose products may, or may not, be written to slices of an output."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mla.reference import small as linear

Bmm = Callable[..., torch.Tensor]


def refuses(bmm: Bmm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    raise RuntimeError("out must be contiguous")


def warns(bmm: Bmm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    warnings.warn("An output with one or more elements was resized", UserWarning, stacklevel=2)
    bmm(x, weight, out=out)


def ignores_strides(bmm: Bmm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    made = bmm(x, weight)
    out.as_strided(made.shape, made.stride()).copy_(made)


STACKS = (refuses, warns, ignores_strides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_that_writes_slices_is_recognised(dtype: torch.dtype) -> None:
    assert linear.serves_slices(torch.device("cpu"), dtype)
    assert not linear.writes_in_place(torch.device("cpu"), dtype)  # it could, and would not gain by it


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_that_does_not_keeps_its_copy(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bmm = torch.bmm

    def other(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
        return bmm(x, weight) if out is None else stack(bmm, x, weight, out)

    monkeypatch.setattr(torch, "bmm", other)
    assert not linear.serves_slices(torch.device("cpu"), torch.float32)
