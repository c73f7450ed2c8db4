"""Which kernels NVIDIA GPUs have for attention, and on which architecture each runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mla_backends import FusedOp
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashInferMla,
    FlashMla,
    LatentLimits,
    SdpaExpanded,
    VarlenLimits,
)
from mla_backends.kernels.flashinfer import LIMITS as FLASHINFER_LIMITS

if TYPE_CHECKING:
    import torch

Architecture = Callable[[], tuple[int, int]]
Reason = Callable[["torch.device"], str]

# FlashMLA plans one part per multiprocessor and tile of this many query rows; early releases perhaps none.
TILE = 64

# `pip install flash-mla` installs a placeholder of that name.
_FLASH_MLA = "build it from https://github.com/deepseek-ai/FlashMLA"
_FLASH_ATTN_3 = "build the folder hopper of https://github.com/Dao-AILab/flash-attention"


def kernels(architecture: Architecture, multiprocessors: int | None) -> Mapping[str, FusedOp]:
    """Return the ops, best first. `multiprocessors` None means unknown."""
    hopper, ampere = _only(architecture, (9, 0)), _from(architecture, (8, 0))
    rows = (multiprocessors or 1) * TILE
    return {
        "flash_mla": FlashMla(LatentLimits(max_query_rows=rows, device_reason=hopper), install=_FLASH_MLA),
        "flashinfer": FlashInferMla(
            replace(FLASHINFER_LIMITS, device_reason=ampere), install="pip install flashinfer-python"
        ),
        "flash_attn_3": FlashAttnVarlen(
            VarlenLimits(pads_values=False, device_reason=hopper),
            module="flash_attn_interface",
            install=_FLASH_ATTN_3,
        ),
        "flash_attn": FlashAttnVarlen(VarlenLimits(device_reason=ampere), install="pip install flash-attn"),
        "sdpa": SdpaExpanded(pads_values=True),
    }


def _only(architecture: Architecture, wanted: tuple[int, int]) -> Reason:
    def reason(device: torch.device) -> str:
        found = architecture()
        why = f"it runs on {_name(wanted)} only, but this is {_name(found)}"
        return "" if found == wanted else why

    return reason


def _from(architecture: Architecture, least: tuple[int, int]) -> Reason:
    def reason(device: torch.device) -> str:
        found = architecture()
        why = f"it needs {_name(least)} or newer, but this is {_name(found)}"
        return "" if found >= least else why

    return reason


def _name(architecture: tuple[int, int]) -> str:
    return f"sm_{architecture[0]}{architecture[1]}"
