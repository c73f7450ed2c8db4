"""Which kernels MetaX GPUs have for attention: mcFlashMLA, and flash-attn built for MACA."""

from __future__ import annotations

from collections.abc import Mapping

from mla_backends import FusedOp
from mla_backends.kernels import FlashAttnVarlen, FlashMla, LatentLimits, SdpaExpanded
from mla_backends.triton_ops import Tile, Tuning

_INSTALL = "its wheel for this MACA SDK is on MetaX's own index; those on PyPI are not for this device"


def kernels() -> Mapping[str, FusedOp]:
    """Return the ops, best first.

    mcFlashMLA reportedly takes any power of two as page size; deployments use 64. Not documented: what it
    gives for rows without keys, and whether its planning can be captured into a graph.

    Values are padded to the width of keys: SDPA's FlashAttention requires that (check_head_dim_size_flash in
    mcPytorch's sdp_utils.cpp at 2ee4c34), and flash-attn takes it; vLLM-metax calls flash-attn without
    padding, which was not tried here. torch's own varlen operator is not offered, although mcPytorch
    registers it: what the MACA library behind it does with bounds of int32 is not public.
    """
    return {
        "flash_mla": FlashMla(LatentLimits(empty_rows=False, graph=False), install=_INSTALL),
        "flash_attn": FlashAttnVarlen(install=_INSTALL),
        "sdpa": SdpaExpanded(pads_values=True),
    }


# -------------------------------------------------------------------------------------------- tiles
# Tiles of the Triton kernels on MetaX GPUs. Not run on hardware.

# 64 KiB of shared memory, and larger tiles have made its compiler hang (FlagGems, issue 6191).
DEFAULTS = Tuning(latent={1: Tile(16, 16, 4, 1)}, expanded={1: Tile(32, 32, 4, 1)})
