"""Which kernels Moore Threads GPUs have for attention: MATE, MT-flashMLA before it, and those of torch_musa.

The first two serve capability 3.1 (MTT S5000) only. MT-flashMLA ends the process when a page or width is
wrong and waits for the device on every call, so its limits are as narrow as its source.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mla_backend_moore.mate import MateMla, MateVarlen
from mla_backends import FusedOp
from mla_backends.kernels import FlashMla, LatentLimits, SdpaExpanded, TorchVarlen, VarlenLimits

if TYPE_CHECKING:
    import torch

CAPABILITY = "3.1"  # that the kernels are compiled for, in Moore Threads' own numbering
# MT-flashMLA plans one part per multiprocessor and tile of this many query rows; with none, it reads garbage.
LEGACY_TILE = 32
# Not documented: what rows without keys give, and whether planning can be captured into a graph.
CAREFUL = LatentLimits(empty_rows=False, graph=False)
# muDNN's FlashAttention takes values narrower than keys (MuDNNFlashVarlenFwd in torch_musa's SDP.cpp). SDPA
# picks it for 192 and 128 and for widths up to 128 (SDPUtils.h at 94a8bde), from capability 2.2 (MTT S4000)
# on; with values padded to 192 it would fall back to plain products. Neither was run on a card.
MUDNN = VarlenLimits(pads_values=False)
FIRST_WITH_FLASH = (2, 2)

_LEGACY = "see https://github.com/MooreThreads/MT-flashMLA"


def kernels(capability: Callable[[], str | None], multiprocessors: int | None) -> Mapping[str, FusedOp]:
    """Return the ops, best first. `multiprocessors` None means unknown."""

    def device_reason(device: torch.device) -> str:
        found = capability()
        wanted = f"it runs on capability {CAPABILITY} (MTT S5000) only"
        return "" if found == CAPABILITY else f"{wanted}, but this device reports {found}"

    def legacy_reason(device: torch.device) -> str:
        return device_reason(device) or _not_legacy()

    def flash_reason(device: torch.device) -> str:
        found = capability()
        why = f"it needs capability 2.2 (MTT S4000) or newer, but this device reports {found}"
        return "" if found and tuple(map(int, found.split("."))) >= FIRST_WITH_FLASH else why

    rows = (multiprocessors or 1) * LEGACY_TILE
    return {
        "mate": MateMla(device_reason),
        "mt_flash_mla": FlashMla(
            replace(CAREFUL, dtypes=("bfloat16",), max_query_rows=rows, device_reason=legacy_reason),
            install=_LEGACY,
        ),
        "mate_varlen": MateVarlen(device_reason),
        "torch_varlen": TorchVarlen(replace(MUDNN, device_reason=flash_reason)),
        "sdpa": SdpaExpanded(),
    }


def _not_legacy() -> str:
    """Return why the installed `flash_mla` is not MT-flashMLA; MATE also ships a module of that name."""
    if importlib.util.find_spec("flash_mla") is None:
        return ""  # another reason says so
    if importlib.util.find_spec("flash_mla_musa") is None:
        return "this flash_mla is not MT-flashMLA: it has no extension flash_mla_musa"
    if hasattr(sys.modules.get("flash_mla"), "FlashMLASchedMeta"):
        return "this flash_mla is not MT-flashMLA: it is of a newer generation"
    return ""
