"""Which kernels NVIDIA GPUs have for attention, and on which architecture each runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mla_backends import FusedOp
from mla_backends.api import AttentionSpec
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashInferMla,
    FlashMla,
    LatentLimits,
    SdpaExpanded,
    TorchVarlen,
    VarlenLimits,
)
from mla_backends.kernels.flashinfer import LIMITS as FLASHINFER_LIMITS
from mla_backends.kernels.torch_varlen import LIMITS as TORCH_LIMITS

if TYPE_CHECKING:
    import torch

Architecture = Callable[[], tuple[int, int]]
Reason = Callable[["torch.device"], str]

# FlashMLA plans one part per multiprocessor and tile of this many query rows; early releases perhaps none.
TILE = 64

# torch's SDPA asks cuDNN first on these architectures, if it is newer than this (9.15.0), and cuDNN takes
# values narrower than keys: either width up to 128, or 192 and 128. FlashAttention 2 wants them equal.
# From check_prefer_cudnn_attention and check_cudnn_tensor_shapes in PyTorch's sdp_utils.cpp at 001f694.
CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))
CUDNN_NEWER_THAN = 91500
CUDNN_WIDTHS = (192, 128)

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
        "torch_varlen": TorchVarlen(replace(TORCH_LIMITS, device_reason=ampere)),
        "sdpa": SdpaExpanded(pads_values=_wants_equal_widths(architecture)),
    }


def _wants_equal_widths(architecture: Architecture) -> Callable[[AttentionSpec], bool]:
    """Return a function that says whether SDPA's fastest kernel needs values as wide as keys."""

    def pads(spec: AttentionSpec) -> bool:
        import torch

        widths = (spec.qk_nope_head_dim + spec.qk_rope_head_dim, spec.v_head_dim)
        takes = max(widths) <= CUDNN_WIDTHS[1] or widths == CUDNN_WIDTHS
        first = architecture() in CUDNN_FIRST and (torch.backends.cudnn.version() or 0) > CUDNN_NEWER_THAN
        return not (takes and first)

    return pads


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
