"""The compiled ops that work row by row against float64, at every level this processor has."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_cases import BF16, angles, draw

from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import NativeLinear, NativeRmsNorm, NativeRotateQuery, NativeWriteLatent

# The package's attribute of this name is a function.
native_ops = importlib.import_module("mla_backend_cpu.native_ops")


def test_every_kind_of_nan_is_rounded_to_nan(kernels: Library) -> None:
    """One whose payload is all ones would become minus zero if it were rounded like a number."""
    cos_sin = torch.full((1, 64), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    out = torch.zeros(1, 2, 64, dtype=BF16)
    for interleaved in (False, True):
        NativeRotateQuery(kernels)(x=draw(1, 2, 64), cos_sin=cos_sin, interleaved=interleaved, out=out)
        assert out.isnan().all()


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
