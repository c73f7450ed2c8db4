"""Which kernels Moore Threads GPUs have for attention: MATE's, and those of torch_musa.

MATE's, for the MTT S5000, are compiled with mcc when they are first called. (Read in MATE 0.2.2, commit
3f58cc3 of 2026-05-26. A later source, yeahdongcn/mate at bbcd8b8 with the sparse kernels of 0.2.4 and
newer, has the same dense signatures, plans and layouts; the releases are not public.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mla_backends import FusedOp
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashMla,
    FlashMlaSparse,
    LatentLimits,
    SdpaExpanded,
    TorchVarlen,
    VarlenLimits,
)
from mla_backends.triton_ops import Tile, Tuning

if TYPE_CHECKING:
    import torch

COMPILES = "it compiles its kernel for this device at first use (a minute or more)"
MATE_INSTALL = "see https://github.com/MooreThreads/mate; the package of that name on PyPI is another"
MATE_CURE = "install the MUSA toolkit with mcc, or a MATE with kernels built ahead of time"
HEADS = (8, 16, 32, 64, 128)  # what MATE's own tests cover; other head counts are padded
# Not documented: what rows without keys give, and whether planning can be captured into a graph.
MATE_LATENT = LatentLimits(
    heads=HEADS, pads_heads_to=HEADS, lse_layout="tokens_first", empty_rows=False, graph=False
)
# Its sparse kernels, by TileLang, compute places in 32 bits (TL_DISABLE_INDEX_TYPE_PROMOTION, and descriptors
# of a cache's bytes in int32), and write blocks of 64 heads whatever a token has.
MATE_SPARSE = replace(FlashMlaSparse.limits, graph=False, max_bytes=(1 << 31) - 1)
# `_check_valid_asm_input` in mate/mha_interface.py: 192 and 128, or values as wide as keys of at most 128.
# Other widths have kernels too, which its tests cover for 128 and 256 only.
MATE_VARLEN = VarlenLimits(pads_values=False, max_unlisted=128, blind_tokens=False)

CAPABILITY = "3.1"  # of the MTT S5000, in Moore Threads' own numbering: MATE's kernels are compiled for it
# muDNN's FlashAttention takes values narrower than keys (MuDNNFlashVarlenFwd in torch_musa's SDP.cpp). SDPA
# picks it for 192 and 128 and for widths up to 128 (SDPUtils.h at 94a8bde), from capability 2.2 (MTT S4000)
# on; with values padded to 192 it would fall back to plain products. Neither was run on a card.
MUDNN = VarlenLimits(pads_values=False)
FIRST_WITH_FLASH = (2, 2)


def kernels(capability: Callable[[], str | None]) -> Mapping[str, FusedOp]:
    """Return the ops, best first; `capability` says the device's, once it is known."""

    def device_reason(device: torch.device) -> str:
        reported = capability()
        wanted = f"it runs on capability {CAPABILITY} (MTT S5000) only"
        return "" if reported == CAPABILITY else f"{wanted}, but this device reports {reported}"

    def flash_reason(device: torch.device) -> str:
        reported = capability()
        why = f"it needs capability 2.2 (MTT S4000) or newer, but this device reports {reported}"
        return "" if reported and tuple(map(int, reported.split("."))) >= FIRST_WITH_FLASH else why

    mate = {"install": MATE_INSTALL, "compiles": COMPILES, "cure": MATE_CURE}
    return {
        "mate": FlashMla(replace(MATE_LATENT, device_reason=device_reason), module="mate.flashmla", **mate),
        "mate_sparse": FlashMlaSparse(
            replace(MATE_SPARSE, device_reason=device_reason), module="mate.flashmla", **mate
        ),
        "mate_varlen": FlashAttnVarlen(
            replace(MATE_VARLEN, device_reason=device_reason), module="mate.mha_interface", **mate
        ),
        "torch_varlen": TorchVarlen(replace(MUDNN, device_reason=flash_reason)),
        "sdpa": SdpaExpanded(),
    }


# -------------------------------------------------------------------------------------------- tiles
# Tiles of the Triton kernels on Moore Threads GPUs. Not run on hardware.

# Eight warps and no pipeline, as FlagGems has it here; 64 KiB of shared memory hold these.
TILES = Tuning(latent={1: Tile(16, 32, 8, 1)}, expanded={1: Tile(64, 32, 8, 1)})
