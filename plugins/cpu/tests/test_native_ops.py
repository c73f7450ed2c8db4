"""The compiled projections against float64, at every level this processor has.

Bounds are per element and hold for any right kernel: one rounding to bf16, and fp32 rounding of each term.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import BF16, CPU, LAYOUTS, Canvas, any_bits, assert_rounded, bits, draw, laid_out

from mla_backend_cpu import products
from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import NativeBatchedLinear, NativeLinear
from mla_backends.api import LinearSpec

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


def check_linear(
    kernels: Library,
    tokens: int,
    inputs: int,
    outputs: int,
    biased: bool = False,
    x_layout: str = "plain",
    out_layout: str = "plain",
    seed: int = 0,
    dtype: torch.dtype = BF16,
) -> None:
    op = NativeLinear(kernels)
    assert op.unsupported_reasons(LinearSpec(inputs, outputs, 1, dtype, CPU)) == []
    x, weight = (
        draw(tokens, inputs, seed=seed, dtype=dtype),
        draw(outputs, inputs, seed=seed + 1, dtype=dtype),
    )
    bias = 3 * draw(outputs, seed=seed + 2, dtype=dtype) if biased else None
    out = Canvas((tokens, outputs), out_layout, dtype)
    op(op.pack(weight), x=laid_out(x, x_layout), bias=bias, out=out.view)
    wide, offset = weight.double().T, bias.double() if biased else torch.zeros(outputs).double()
    terms = x.double().abs() @ wide.abs() + offset.abs()
    assert_rounded(out.taken(), x.double() @ wide + offset, terms, inputs)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 80),
    st.integers(1, 300),
    st.booleans(),
    layouts,
    layouts,
    seeds,
    dtypes,
)
def test_linear_is_right_for_any_shape(
    kernels: Library,
    tokens: int,
    half: int,
    outputs: int,
    biased: bool,
    x_layout: str,
    out_layout: str,
    seed: int,
    dtype: torch.dtype,
) -> None:
    inputs = 2 * half - (dtype == FP32)
    check_linear(kernels, tokens, inputs, outputs, biased, x_layout, out_layout, seed, dtype)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [
        (1, 2, 1),
        (3, 4100, 70),
        (7, 2048, 65),
        (9, 4100, 200),
        (16, 1536, 129),
        (70, 4096, 40),
        (200, 2048, 33),
    ],
)
def test_linear_walks_over_blocks_of_rows_and_panels(
    kernels: Library, dtype: torch.dtype, tokens: int, inputs: int, outputs: int
) -> None:
    check_linear(kernels, tokens, inputs, outputs, biased=True, dtype=dtype)


def test_every_number_of_tokens_is_cut_into_register_blocks_rightly(
    kernels: Library, dtype: torch.dtype
) -> None:
    for tokens in (*range(1, 34), 43, 57):
        check_linear(kernels, tokens, 6, 97, seed=tokens, dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 140),
    layouts,
    layouts,
    seeds,
    dtypes,
)
def test_batched_linear_is_right_for_any_shape(
    kernels: Library,
    tokens: int,
    heads: int,
    half: int,
    outputs: int,
    x_layout: str,
    out_layout: str,
    seed: int,
    dtype: torch.dtype,
) -> None:
    inputs = 2 * half - (dtype == FP32)
    check_batched(kernels, tokens, heads, inputs, outputs, x_layout, out_layout, seed, dtype)


@pytest.mark.parametrize(("tokens", "heads"), [(1, 128), (5, 16), (130, 3)])
def test_batched_linear_serves_real_widths(
    kernels: Library, dtype: torch.dtype, tokens: int, heads: int
) -> None:
    check_batched(kernels, tokens, heads, 128, 512, dtype=dtype)
    check_batched(kernels, tokens, heads, 512, 128, dtype=dtype)


def test_heads_of_many_tokens_are_copied_in_parts(kernels: Library, dtype: torch.dtype) -> None:
    check_batched(kernels, 200, 128, 2, 3, dtype=dtype)


def check_batched(
    kernels: Library,
    tokens: int,
    heads: int,
    inputs: int,
    outputs: int,
    x_layout: str = "plain",
    out_layout: str = "plain",
    seed: int = 0,
    dtype: torch.dtype = BF16,
) -> None:
    op = NativeBatchedLinear(kernels)
    assert op.unsupported_reasons(LinearSpec(inputs, outputs, heads, dtype, CPU)) == []
    x = draw(tokens, heads, inputs, seed=seed, dtype=dtype)
    weight = draw(heads, outputs, inputs, seed=seed + 1, dtype=dtype)
    out = Canvas((tokens, heads, outputs), out_layout, dtype)
    op(op.pack(weight), x=laid_out(x, x_layout), out=out.view)
    truth = torch.einsum("thi,hoi->tho", x.double(), weight.double())
    terms = torch.einsum("thi,hoi->tho", x.double().abs(), weight.double().abs())
    assert_rounded(out.taken(), truth, terms, inputs)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_are_no_work(kernels: Library, dtype: torch.dtype, tokens: int) -> None:
    linear, batched = NativeLinear(kernels), NativeBatchedLinear(kernels)
    drawn = functools.partial(draw, dtype=dtype)
    packed = linear.pack(drawn(20, 8)), batched.pack(drawn(3, 20, 8))
    linear(packed[0], x=drawn(tokens, 8), bias=None, out=torch.empty(tokens, 20, dtype=dtype))
    batched(packed[1], x=drawn(tokens, 3, 8), out=torch.empty(tokens, 3, 20, dtype=dtype))


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


def test_a_large_weight_begins_where_a_huge_page_may(kernels: Library) -> None:
    packed = NativeLinear(kernels).pack(draw(1024, 1024))
    assert packed.data[0].data_ptr() % (2 << 20) == 0
    assert packed.nbytes == 2 << 20


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
        check_linear(kernels, tokens, inputs, 20, dtype=dtype)


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
