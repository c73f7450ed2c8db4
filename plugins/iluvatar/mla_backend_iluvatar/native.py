"""Which dtypes a device really computes, determined by a small product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_backends.errors import describe

if TYPE_CHECKING:
    import torch


def refusal(dtype: torch.dtype, device: torch.device) -> str:
    """Return why the device does not multiply in `dtype`; empty if a product is exactly right.

    The factors are small integers, so that the product [16, 16] has no rounding in any floating dtype.
    """
    import torch

    factor = (torch.arange(256) * 5 % 7 - 3).view(16, 16)
    try:
        there = factor.to(device, dtype)
        product = (there @ there).cpu()
    except Exception as error:  # noqa: BLE001  # vendor stacks raise anything
        return f"a product raised {describe(error)}"
    right = torch.equal(product.double(), (factor @ factor).double())
    return "" if right else "a product came out wrong"
