"""Which kernels Iluvatar GPUs have for attention: that of ixformer, one query token per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mla_backends import FusedOp
from mla_backends.errors import describe
from mla_backends.kernels import IxformerMla, SdpaExpanded
from mla_backends.triton_ops import Tile, Tuning

if TYPE_CHECKING:
    import torch


def kernels() -> Mapping[str, FusedOp]:
    """Return the ops, best first.

    Which widths CoreX's SDPA serves fast is not public. Values are padded to the width of keys, which
    FlashAttention 2 and its relatives require; not run on hardware.
    """
    return {
        "ixformer": IxformerMla(install="it comes with the CoreX SDK"),
        "sdpa": SdpaExpanded(pads_values=True),
    }


# ------------------------------------------------------------------------------------------- native
# Which dtypes a device really computes, determined by a small product.
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


# -------------------------------------------------------------------------------------------- tiles
# Tiles of the Triton kernels on Iluvatar GPUs. Not run on hardware.

# Eight warps and no pipeline, as FlagGems has it here; 64 KiB of shared memory hold these.
DEFAULTS = Tuning(latent={1: Tile(16, 32, 8, 1)}, expanded={1: Tile(64, 32, 8, 1)})
