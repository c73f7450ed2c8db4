"""The reference norm, rotation and cache write against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import DTYPES, ROUNDING, angles, draw

from mla.reference import REFERENCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_rms_norm_uses_its_eps_and_rounds_once(
    assert_rows_close: Any, dtype: torch.dtype, eps: float
) -> None:
    x, weight = draw(6, 24, dtype=dtype) * 1e-3, draw(24, dtype=dtype, seed=1)
    out = torch.full_like(x, torch.nan)
    REFERENCE["rms_norm"](x=x, weight=weight, eps=eps, out=out)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert_rows_close(out, truth, ROUNDING[dtype])


def rotated(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate by complex multiplication in float64; x [.., r] with angles [.., r]."""
    half = x.shape[-1] // 2
    turn = torch.complex(*cos_sin.double().chunk(2, dim=-1))
    if interleaved:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)
    product = torch.complex(*x.double().chunk(2, dim=-1)) * turn
    return torch.cat((product.real, product.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_multiplies_channel_pairs_as_complex_numbers(
    assert_rows_close: Any, dtype: torch.dtype, interleaved: bool
) -> None:
    x, cos_sin = draw(5, 3, 8, dtype=dtype), angles(5, 8)
    out = torch.full_like(x, torch.nan)
    REFERENCE["rotate_query"](x=x, cos_sin=cos_sin, interleaved=interleaved, out=out)
    assert_rows_close(out, rotated(x, cos_sin[:, None], interleaved), ROUNDING[dtype])


def test_rotation_in_place_gives_the_same_bits() -> None:
    x, cos_sin = draw(5, 3, 20), angles(5, 8)
    out = torch.empty(5, 3, 8)
    REFERENCE["rotate_query"](x=x[..., 12:], cos_sin=cos_sin, interleaved=True, out=out)
    untouched = x[..., :12].clone()
    REFERENCE["rotate_query"](x=x[..., 12:], cos_sin=cos_sin, interleaved=True, out=x[..., 12:])
    assert torch.equal(x[..., 12:], out)
    assert torch.equal(x[..., :12], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_latent_norms_rotates_and_touches_only_its_slots(
    assert_rows_close: Any, dtype: torch.dtype
) -> None:
    kv_a, weight, cos_sin = draw(4, 30, dtype=dtype)[:, 6:], draw(16, dtype=dtype, seed=1), angles(4, 8)
    slots, cache = torch.tensor([9, 2, 3, 14]), draw(4, 4, 24, dtype=dtype, seed=2)
    before = cache.clone().view(-1, 24)
    REFERENCE["write_latent"](
        kv_a=kv_a, weight=weight, eps=1e-6, cos_sin=cos_sin, interleaved=True, slots=slots, cache=cache
    )
    rows, wide = cache.view(-1, 24), kv_a[:, :16].double()
    norm = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_rows_close(rows[slots][:, :16], norm, ROUNDING[dtype])
    assert_rows_close(rows[slots][:, 16:], rotated(kv_a[:, 16:], cos_sin, True), ROUNDING[dtype])
    others = [row for row in range(16) if row not in slots.tolist()]
    assert torch.equal(rows[others], before[others])
