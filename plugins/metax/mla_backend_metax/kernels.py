"""Which kernels MetaX GPUs have for attention: mcFlashMLA, and flash-attn built for MACA."""

from __future__ import annotations

from collections.abc import Mapping

from mla_backends import FusedOp
from mla_backends.kernels import FlashAttnVarlen, FlashMla, LatentLimits, SdpaExpanded

_INSTALL = "its wheel for this MACA SDK is on MetaX's own index; those on PyPI are not for this device"


def kernels() -> Mapping[str, FusedOp]:
    """Return the ops, best first.

    mcFlashMLA reportedly takes any power of two as page size; deployments use 64. Not documented: what it
    gives for rows without keys, and whether its planning can be captured into a graph.
    """
    return {
        "flash_mla": FlashMla(LatentLimits(empty_rows=False, graph=False), install=_INSTALL),
        "flash_attn": FlashAttnVarlen(install=_INSTALL),
        "sdpa": SdpaExpanded(pads_values=True),
    }
