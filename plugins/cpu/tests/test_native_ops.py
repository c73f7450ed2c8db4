"""The compiled projections against float64, at every level this processor has.

Bounds are per element and hold for any right kernel: one rounding to bf16, and fp32 rounding of each term.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import BF16, LAYOUTS, any_bits, assert_rounded, bits, draw, laid_out

from mla_backend_cpu import products
from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import NativeBatchedLinear, NativeLinear

FP32 = torch.float32
dtypes = st.sampled_from([BF16, FP32])
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 99)


@pytest.fixture(params=[(BF16, 0.5), (BF16, 2.0), (FP32, 1.0)], ids=["pairs", "wide", "fp32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Decide instead of the measurement whether bf16 values are widened, so that both ways are tested."""
    dtype, gain = request.param
    monkeypatch.setattr(products, "widening_gain", lambda kernels: gain)
    return dtype


# ---------------------------------------------------------------------------------------------- projections


def check_linear(kernels: Library, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    op = NativeLinear(kernels)
    x, weight = draw(tokens, inputs, dtype=dtype), draw(outputs, inputs, seed=1, dtype=dtype)
    out = torch.empty(tokens, outputs, dtype=dtype)
    op(op.pack(weight), x=x, bias=None, out=out)
    wide = weight.double().T
    assert_rounded(out, x.double() @ wide, x.double().abs() @ wide.abs(), inputs)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(1, 40),
    st.booleans(),
    st.integers(1, 3),
    layouts,
    seeds,
    dtypes,
)
def test_unpacking_gives_the_weight_bit_for_bit(
    kernels: Library,
    groups: int,
    outputs: int,
    half: int,
    transposed: bool,
    count: int,
    layout: str,
    seed: int,
    dtype: torch.dtype,
) -> None:
    op: Any = NativeBatchedLinear(kernels) if groups else NativeLinear(kernels)
    shape = (2 * half, outputs) if transposed else (outputs, 2 * half)
    weight = laid_out(any_bits(*([groups] if groups else []), *shape, seed=seed), layout).to(dtype)
    weight = weight.transpose(-1, -2) if transposed else weight
    packed = op.pack(weight)
    assert packed.nbytes >= weight.nbytes
    assert torch.equal(bits(op.unpack(packed)), bits(weight))


def test_packing_keeps_no_copy_of_the_weight(kernels: Library) -> None:
    weight = draw(33, 64)
    gone = weakref.ref(weight.untyped_storage())
    packed = NativeLinear(kernels).pack(weight)
    del weight
    gc.collect()
    assert gone() is None
    assert packed.nbytes == 48 * 64 * 2  # outputs in panels of 16


def test_a_nan_or_infinity_in_one_token_stays_there(kernels: Library, dtype: torch.dtype) -> None:
    op, x = NativeLinear(kernels), draw(40, 32, dtype=dtype)
    packed, clean = op.pack(draw(50, 32, seed=1, dtype=dtype)), torch.empty(40, 50, dtype=dtype)
    op(packed, x=x, bias=None, out=clean)
    x[17, 31], x[18, 30] = torch.nan, torch.inf
    out = torch.empty_like(clean)
    op(packed, x=x, bias=None, out=out)
    assert out[17].isnan().all()
    assert out[18].isinf().all()
    assert torch.equal(out[:17], clean[:17])
    assert torch.equal(out[19:], clean[19:])


def test_what_an_earlier_call_left_in_scratch_memory_reaches_no_result(
    kernels: Library, dtype: torch.dtype
) -> None:
    """Sizes that fill no register are filled up, and a NaN that lay there would spread by NaN x 0."""
    op, nothing = NativeLinear(kernels), torch.full((40, 96), torch.nan, dtype=dtype)
    op(op.pack(draw(50, 96, dtype=dtype)), x=nothing, bias=None, out=torch.empty(40, 50, dtype=dtype))
    for tokens, inputs in ((5, 6), (37, 34)):
        check_linear(kernels, tokens, inputs, 20, dtype)


# ---------------------------------------------------------------------------------------------- threads


def test_the_number_of_threads_changes_nothing(kernels: Library, threads: Callable[..., Any]) -> None:
    x, weights = draw(150, 256), draw(300, 256, seed=1)
    heads, per_head = draw(150, 5, 64), draw(5, 70, 64, seed=1)
    linear, batched = NativeLinear(kernels), NativeBatchedLinear(kernels)
    results = []
    for count in (1, 2, 3, 2, 1):
        with threads(count):
            out, other = torch.empty(150, 300, dtype=BF16), torch.empty(150, 5, 70, dtype=BF16)
            linear(linear.pack(weights), x=x, bias=None, out=out)
            batched(batched.pack(per_head), x=heads, out=other)
            results.append((bits(out), bits(other)))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
