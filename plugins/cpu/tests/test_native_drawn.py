"""Drawn cases of the compiled kernels at every level, and of the backend as it is without options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from judged import judged

import mla
from mla.cases import drawn
from mla.conformance.trial import Drawing
from mla_backend_cpu import products
from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import (
    NativeBatchedLinear,
    NativeExpandedAttention,
    NativeLatentAttention,
    NativeLinear,
    NativeOp,
    NativeRmsNorm,
    NativeRotateQuery,
    NativeWriteLatent,
)
from mla_backend_cpu.sparse_ops import NativeSelectLatents, NativeSparseAttention, NativeWriteIndexKey
from mla_backends.testing import HostBackend

DRAWS = {1: 20, 3: 20}  # by threads; each another seed
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWWISE = (NativeRmsNorm, NativeRotateQuery, NativeWriteLatent, NativeWriteIndexKey)
ATTENTION = (NativeLatentAttention, NativeExpandedAttention, NativeSelectLatents, NativeSparseAttention)
# With what is decided in place of a measurement: whether bf16 values are widened.
CASES = [
    *((op, dtype, gain) for op in (NativeLinear, NativeBatchedLinear) for dtype, gain in
      ((BF16, 0.5), (BF16, 2.0), (FP32, 1.0))),
    *((op, BF16, 1.0) for op in (*ROWWISE, *ATTENTION)),
]  # fmt: skip
SMALLER = {"NUMBERS": 1 << 13, "LOGITS": 1 << 12, "ROOMS": (1, 2), "LONG_ROOM": 4, "HUGE_ROOM": 4}


@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize(
    ("op", "dtype", "gain"), CASES, ids=[f"{op.__name__}-{dtype}-{gain:g}" for op, dtype, gain in CASES]
)
def test_no_drawn_case_of_a_kernel_is_wrong(
    kernels: Library,
    threads: Callable[[int], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
    op: type[NativeOp],
    dtype: torch.dtype,
    gain: float,
    count: int,
) -> None:
    monkeypatch.setattr(products, "widening_gain", lambda kernels: gain)
    for name, value in SMALLER.items() if kernels.emulated else ():
        monkeypatch.setattr(drawn, name, value)
    backend, drawing = HostBackend(ops={"native": op(kernels)}), Drawing(DRAWS[count], seed=count)
    with threads(count):
        (result,) = judged(backend, "*.drawn[native-*]", dtypes=(dtype,), drawing=drawing)
    assert (result.status, result.failures) == ("incomplete", [])
    assert result.drawn is not None
    assert result.drawn.judged == DRAWS[count]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_no_drawn_case_of_the_backend_is_wrong(dtype: torch.dtype) -> None:
    backend, drawing = mla.load_backend("cpu", threads=1), Drawing(15, seed=7)
    results = judged(backend, "*.drawn", dtypes=(dtype,), drawing=drawing)
    assert [result.reason for result in results if result.status == "fail"] == []
    assert {result.check for result in results if result.drawn and result.drawn.judged} >= {"latent.drawn"}
