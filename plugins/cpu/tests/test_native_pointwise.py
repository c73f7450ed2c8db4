"""The compiled ops that work row by row against float64, at every level this processor has."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import (
    BF16,
    CPU,
    LAYOUTS,
    Canvas,
    angles,
    any_bits,
    assert_rounded,
    bits,
    draw,
    laid_out,
    spec,
)

from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import NativeLinear, NativeRmsNorm, NativeRotateQuery, NativeWriteLatent
from mla_backends.api import NormSpec

# The package's attribute of this name is a function.
native_ops = importlib.import_module("mla_backend_cpu.native_ops")

layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 99)


def norm_truth(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotate_truth(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate x [T, .., r] in float64, as complex numbers."""
    half = x.shape[-1] // 2
    wide, angles = x.double(), cos_sin.double().view(len(x), *[1] * (x.dim() - 2), 2 * half)
    first, second = (
        (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    )
    turned = torch.complex(first, second) * torch.complex(angles[..., :half], angles[..., half:])
    pair = (turned.real, turned.imag)
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def assert_rotated(actual: torch.Tensor, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> None:
    truth = rotate_truth(x, cos_sin, interleaved)
    terms = 2 * x.double().abs().amax(-1, keepdim=True).expand_as(truth)
    assert_rounded(actual, truth, terms, 2)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 20),
    st.sampled_from([1e-12, 1.0, 1e12]),
    st.sampled_from([1e-6, 1e-5, 1.0]),
    layouts,
    layouts,
    seeds,
)
def test_rms_norm_is_right_for_any_shape(
    kernels: Library,
    tokens: int,
    groups: int,
    size: float,
    eps: float,
    x_layout: str,
    out_layout: str,
    seed: int,
) -> None:
    op, width = NativeRmsNorm(kernels), 16 * groups
    assert op.unsupported_reasons(NormSpec(width, BF16, CPU)) == []
    x, weight = size * draw(tokens, width, seed=seed), draw(width, seed=seed + 1)
    out = Canvas((tokens, width), out_layout)
    op(x=laid_out(x, x_layout), weight=laid_out(weight, "every_other"), eps=eps, out=out.view)
    truth = norm_truth(x, weight, eps)
    assert_rounded(out.taken(), truth, truth.abs(), width)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([32, 64, 96]),
    st.booleans(),
    layouts,
    layouts,
    layouts,
    seeds,
)
def test_rotation_is_right_for_any_shape(
    kernels: Library,
    tokens: int,
    heads: int,
    width: int,
    interleaved: bool,
    x_layout: str,
    out_layout: str,
    angle_layout: str,
    seed: int,
) -> None:
    op, x, cos_sin = NativeRotateQuery(kernels), draw(tokens, heads, width, seed=seed), angles(tokens, width)
    assert op.unsupported_reasons(spec(heads, rotary=width)) == []
    out = Canvas(x.shape, out_layout)
    where = laid_out(x, x_layout)
    op(x=where, cos_sin=laid_out(cos_sin, angle_layout), interleaved=interleaved, out=out.view)
    assert_rotated(out.taken(), x, cos_sin, interleaved)
    assert torch.equal(where, x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_works_in_place(kernels: Library, layout: str, interleaved: bool) -> None:
    x, cos_sin = draw(90, 16, 64), angles(90, 64)  # more than one thread's worth
    there = Canvas(x.shape, layout)
    there.holding(x)
    NativeRotateQuery(kernels)(x=there.view, cos_sin=cos_sin, interleaved=interleaved, out=there.view)
    assert_rotated(there.taken(), x, cos_sin, interleaved)


def test_every_kind_of_nan_is_rounded_to_nan(kernels: Library) -> None:
    """One whose payload is all ones would become minus zero if it were rounded like a number."""
    cos_sin = torch.full((1, 64), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    out = torch.zeros(1, 2, 64, dtype=BF16)
    for interleaved in (False, True):
        NativeRotateQuery(kernels)(x=draw(1, 2, 64), cos_sin=cos_sin, interleaved=interleaved, out=out)
        assert out.isnan().all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 150),
    st.sampled_from([(16, 32), (64, 32), (512, 64)]),
    st.sampled_from([1, 16, 64]),
    st.booleans(),
    layouts,
    layouts,
    seeds,
)
def test_the_cache_write_is_right_and_touches_nothing_else(
    kernels: Library,
    tokens: int,
    widths: tuple[int, int],
    page_size: int,
    interleaved: bool,
    layout: str,
    angle_layout: str,
    seed: int,
) -> None:
    (latent, rotary), op = widths, NativeWriteLatent(kernels)
    assert op.unsupported_reasons(spec(1, latent, rotary)) == []
    kv_a, weight, cos_sin = draw(tokens, latent + rotary, seed=seed), draw(latent), angles(tokens, rotary)
    pages = -(-2 * tokens // page_size)
    cache = any_bits(pages, page_size, latent + rotary, seed=seed)
    slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(seed))[:tokens]
    before = bits(cache).view(-1, latent + rotary)
    op(
        kv_a=laid_out(kv_a, layout),
        weight=laid_out(weight, "every_other"),
        eps=1e-6,
        cos_sin=laid_out(cos_sin, angle_layout),
        interleaved=interleaved,
        slots=slots,
        cache=cache,
    )
    written = cache.view(-1, latent + rotary)
    truth = norm_truth(kv_a[:, :latent], weight, 1e-6)
    assert_rounded(written[slots, :latent], truth, truth.abs(), latent)
    assert_rotated(written[slots, latent:], kv_a[:, latent:], cos_sin, interleaved)
    rest = torch.ones(len(written), dtype=torch.bool)
    rest[slots] = False
    assert torch.equal(bits(cache).view_as(before)[rest], before[rest])


def test_strided_slots_are_read_by_their_stride(kernels: Library) -> None:
    cache, slots = torch.zeros(1, 8, 48, dtype=BF16), torch.tensor([3, 7, 5, 7])
    kv_a, cos_sin = draw(2, 48), angles(2, 32)
    NativeWriteLatent(kernels)(
        kv_a=kv_a,
        weight=draw(16),
        eps=1e-6,
        cos_sin=cos_sin,
        interleaved=True,
        slots=slots[::2],
        cache=cache,
    )
    assert cache[0].any(-1).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("slot", [-1, 8, 1 << 40])
def test_a_slot_outside_the_cache_is_a_sentence(kernels: Library, slot: int) -> None:
    cache = torch.zeros(2, 4, 48, dtype=BF16)
    with pytest.raises(ValueError, match=rf"slots names slot {slot} for token 1, but the cache has 8\."):
        NativeWriteLatent(kernels)(
            kv_a=draw(2, 48),
            weight=draw(16),
            eps=1e-6,
            cos_sin=angles(2, 32),
            interleaved=True,
            slots=torch.tensor([0, slot]),
            cache=cache,
        )
    assert not cache.any()


def test_no_tokens_are_no_work(kernels: Library) -> None:
    cache, cos_sin = torch.zeros(1, 4, 96, dtype=BF16), angles(0, 32)
    NativeRmsNorm(kernels)(x=draw(0, 32), weight=draw(32), eps=1e-6, out=draw(0, 32))
    NativeRotateQuery(kernels)(x=draw(0, 2, 32), cos_sin=cos_sin, interleaved=True, out=draw(0, 2, 32))
    NativeWriteLatent(kernels)(
        kv_a=draw(0, 96),
        weight=draw(64),
        eps=1e-6,
        cos_sin=cos_sin,
        interleaved=True,
        slots=torch.arange(0),
        cache=cache,
    )
    assert (cache == 0).all()


def test_copies_of_strided_arguments_outlive_the_call(
    kernels: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels get raw addresses, and other threads may allocate while they run."""
    copies, seen, direct = [], [], native_ops._direct

    def watched(name: str, x: torch.Tensor) -> torch.Tensor:
        contiguous = direct(name, x)
        copies.append(weakref.ref(contiguous))
        return contiguous

    class Watch:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                alive = [copy() is not None for copy in copies]
                copies.clear()
                seen.append((name, len(alive), all(alive)))
                getattr(kernels.functions, name)(*arguments)

            return call

    monkeypatch.setattr(native_ops, "_direct", watched)
    linear, norm, write = NativeLinear(kernels), NativeRmsNorm(kernels), NativeWriteLatent(kernels)
    packed = linear.pack(draw(40, 8))
    for op in (linear, norm, write):
        op.functions = Watch()
    linear(packed, x=draw(3, 16)[:, ::2], bias=draw(80)[::2], out=torch.empty(3, 80, dtype=BF16)[:, ::2])
    norm(x=draw(3, 128)[:, ::2], weight=draw(128)[::2], eps=1e-6, out=torch.empty(3, 128, dtype=BF16)[:, ::2])
    write(
        kv_a=draw(3, 192)[:, ::2],
        weight=draw(128)[::2],
        eps=1e-6,
        cos_sin=angles(3, 64)[:, ::2],
        interleaved=True,
        slots=torch.arange(6)[::2],
        cache=torch.zeros(1, 8, 96, dtype=BF16),
    )
    assert seen == [("mla_linear", 3, True), ("mla_rms_norm", 3, True), ("mla_write_latent", 4, True)]
