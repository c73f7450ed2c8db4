"""Which kernels NVIDIA GPUs have for attention, on which architecture each runs, and how to get it.

A card's best kernel comes first among those that run on it: FlashMLA on Hopper, TokenSpeed's on Blackwell.
Where our Triton kernels stand among them is in `AHEAD_OF_FLASHINFER`. The hint for a missing package is given
for cards that can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mla_backends import FusedOp
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashInferMla,
    FlashInferSparse,
    FlashMla,
    FlashMlaSparse,
    LatentLimits,
    SdpaExpanded,
    TokenspeedMla,
    TokenspeedPrefill,
    TorchVarlen,
    VarlenLimits,
)
from mla_backends.kernels.flashinfer import compiled_kernels
from mla_backends.kernels.latent import ARGUMENTS, DECODE, PLAN
from mla_backends.kernels.vendor import DeviceReason, VendorOp
from mla_backends.torch_backend import versions
from mla_backends.triton_ops.launcher import PACKAGES

Architecture = tuple[int, int]  # (9, 0) is Hopper

# FlashMLA plans one part per multiprocessor and tile of this many query rows; early releases perhaps none.
TILE = 64
# Its planner takes 20 bytes of shared memory per row, of which Hopper has 227 KiB; beyond, the process ends.
FLASH_MLA_ROWS = 11_000

# The oldest Triton for our kernels: older ones spill what newer ones keep in registers, have no programmatic
# dependent launch, and end the process on newer cards.
OLDEST_TRITON = (3, 6)
# The driver of CUDA 12.3, whose graphs are the first that can hold such launches: with an older one, capture
# fails. Torch's wheels for CUDA 12 run on drivers from 525 on.
EARLY_DRIVER = 545
AMPERE, ADA = (8, 0), (8, 9)
HOPPER = ((9, 0),)
SPARSE_FLASH_MLA = ((9, 0), (10, 0), (10, 3))  # sm_90a and sm_100f: what sgl-flash-mla 1.0.0 says it serves
TRTLLM_GEN = ((10, 0), (10, 3))  # whose sparse kernels read bf16 caches
BLACKWELL = ((10, 0), (10, 3), (10, 7))  # of data centres, with tensor memory; not sm_120

_TOKENSPEED = "pip install tokenspeed-mla"
_FLASH_ATTN_3 = "build the folder hopper of https://github.com/Dao-AILab/flash-attention"
_FLASH_ATTN = (
    "pip install a wheel from https://github.com/Dao-AILab/flash-attention/releases that names this torch; "
    "without one, pip compiles for an hour"
)


# Where our kernel for absorbed attention comes before FlashInfer's, by the predictions of
# benchmarks/triton/model.md, and the share of the tensor peak that FlashInfer is reported to reach there with
# 128 heads; 0 is unknown. It is last on other cards. No card has run our kernels.
AHEAD_OF_FLASHINFER: Mapping[Architecture, float] = {
    # FlashMLA reports 660 TFLOP/s (its README), FlashInfer 280 to 377 (TileLang's comparison), and ours is
    # predicted between the two: without a wheel of FlashMLA it comes first.
    (9, 0): 0.38,
    # Predicted to be bound by memory with 16 heads.
    (8, 0): 0.0,
    # The same. Other kernels are written for data centres, whose blocks may use more shared memory.
    **dict.fromkeys(((8, 6), (8, 7), (8, 9), (12, 0), (12, 1)), 0.0),
    # Not BLACKWELL: sums move between tensor memory and registers in every step.
}


def ahead_of(architecture: Architecture) -> Mapping[str, str]:
    """Return our op -> the op that it comes before on an architecture: see `AHEAD_OF_FLASHINFER`.

    Expanded attention of ours comes last: FlashAttention is at least as fast by every report.
    """
    return {"triton_latent": "flashinfer"} if architecture in AHEAD_OF_FLASHINFER else {}


class NewerFlashMla(FlashMla):
    """FlashMLA since 2025-09-24. The planner before it ends the process for more than 4095 rows."""

    needs: Mapping[str, Mapping[str, Any]] = {DECODE: {**ARGUMENTS, "is_fp8_kvcache": False}, PLAN: {}}


def kernels(here: Architecture, multiprocessors: int | None) -> Mapping[str, FusedOp]:
    """Return the ops for the architecture `here`, best first. `multiprocessors` None means unknown."""
    flashinfer = f"pip install flashinfer-python, and where there is no nvcc, {compiled_kernels()}"
    flash_mla, ampere = flash_mla_source(), since_ampere(here)

    def on(
        cards: tuple[Architecture, ...], op: type[VendorOp], install: str, limits: Any = None, **named: str
    ) -> VendorOp:
        """Return an op for cards of these architectures, on which alone the hint is given."""
        limits = replace(limits or op.limits, device_reason=_only(here, *cards))
        return op(limits, install=install if here in cards else "", **named)

    of_plan = LatentLimits(max_query_rows=(multiprocessors or 1) * TILE, max_rows=FLASH_MLA_ROWS)
    separate, flash_attn_3 = VarlenLimits(pads_values=False), "flash_attn_interface"
    return {
        "flash_mla": on(HOPPER, NewerFlashMla, flash_mla, of_plan),
        "flash_mla_sparse": on(SPARSE_FLASH_MLA, FlashMlaSparse, flash_mla),
        "flashinfer_sparse": on(TRTLLM_GEN, FlashInferSparse, flashinfer),
        "tokenspeed": on(BLACKWELL, TokenspeedMla, _TOKENSPEED),
        "flashinfer": FlashInferMla(
            replace(FlashInferMla.limits, device_reason=ampere),
            install=flashinfer,
            e4m3_reason=_only(here, *HOPPER),
        ),
        "flash_attn_3": on(HOPPER, FlashAttnVarlen, _FLASH_ATTN_3, separate, module=flash_attn_3),
        "tokenspeed_prefill": on(BLACKWELL, TokenspeedPrefill, _TOKENSPEED),
        "flash_attn": FlashAttnVarlen(VarlenLimits(device_reason=ampere), install=_FLASH_ATTN),
        "torch_varlen": TorchVarlen(replace(TorchVarlen.limits, device_reason=ampere)),
        "sdpa": SdpaExpanded(),
    }


def flash_mla_source() -> str:
    """Return how to get FlashMLA for latents of 576 beside the torch that is installed.

    The wheel of sgl-flash-mla 1.0.0 links libcudart.so.13. Its README says torch 2.10 and newer, its metadata
    say 2.14.1. The package `flash-mla` on PyPI is a placeholder.
    """
    import torch
    from torch.torch_version import TorchVersion

    version = TorchVersion(str(torch.__version__))
    if int((torch.version.cuda or "0").partition(".")[0]) < 13 or version < "2.10":
        return (
            "build commit 9241ae3 of https://github.com/deepseek-ai/FlashMLA, with FLASH_MLA_DISABLE_SM100=1 "
            "for nvcc before 12.9; the wheel sgl-flash-mla needs torch 2.10 or newer for CUDA 13"
        )
    if version < "2.14.1":
        return "pip install --no-deps sgl-flash-mla, as pip would replace this torch by a newer one otherwise"
    return "pip install sgl-flash-mla"


def _only(here: Architecture, *wanted: Architecture) -> DeviceReason:
    why = f"it runs on {', '.join(map(_name, wanted))} only, but this is {_name(here)}"
    return lambda device: "" if here in wanted else why


def since_ampere(here: Architecture) -> DeviceReason:
    """Return what says why a card older than Ampere cannot run a kernel."""
    why = f"it needs {_name(AMPERE)} or newer, but this is {_name(here)}"
    return lambda device: "" if here >= AMPERE else why


def old_triton() -> str:
    """Return why the installed Triton is not tried; "" if it may be, or if there is none."""
    installed, version = installed_triton()
    if not () < version < OLDEST_TRITON:
        return ""
    return f"Triton {installed} is too old for these kernels: use a torch whose Triton is 3.6 or newer"


def starts_early(architecture: Architecture, driver: str = "") -> bool:
    """Return whether card and driver have programmatic dependent launch, in graphs too.

    `driver` is its version, such as "535.183.01"; "" is unknown, and taken for a new one.
    """
    major = driver.partition(".")[0]
    return architecture >= HOPPER[0] and not (major.isdecimal() and int(major) < EARLY_DRIVER)


def installed_triton() -> tuple[str, tuple[int, ...]]:
    """Return the installed version of Triton, as text and as numbers; "" and () if there is none."""
    installed = next(iter(versions((), PACKAGES).values()), "")
    return installed, tuple(int(part) for part in installed.split(".")[:2] if part.isdecimal())


def _name(architecture: Architecture) -> str:
    return f"sm_{architecture[0]}{architecture[1]}"
