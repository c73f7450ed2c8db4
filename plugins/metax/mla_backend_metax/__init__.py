"""MetaX backend: GPUs through the MACA build of PyTorch, whose devices are called `cuda`.

The capability it reports collides with NVIDIA's numbers (a C500 may say 8, 9 or 10), so it is text here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mla_backends import FusedOp, hookimpl
from mla_backends.cuda import CudaBackend
from mla_backends.kernels import FlashAttnVarlen, FlashMla, LatentLimits, SdpaExpanded
from mla_backends.known import KNOWN
from mla_backends.monitor import Dialect
from mla_backends.torch_backend import TF32_VARIABLES
from mla_backends.triton_ops import Tile, TritonBackend, Tuning

if TYPE_CHECKING:
    import torch

__all__ = ["Metax", "mla_backend"]

KERNELS_HINT = "its wheel for this MACA SDK is on MetaX's own index; those on PyPI are not for this device"
# Of the Triton kernels; not run on hardware. A block has 64 KiB of shared memory, and larger tiles have made
# the compiler hang (FlagGems, issue 6191).
TILES = Tuning(latent={1: Tile(16, 16, 4, 1)}, expanded={1: Tile(32, 32, 4, 1)})


class Metax(TritonBackend, CudaBackend):
    """MetaX GPUs."""

    name = "metax"
    api_version = 1
    install_hint = f"install torch from {KNOWN['metax'].torch_source}"
    query_tool = "mx-smi"
    visibility = ("MACA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")  # the first wins where both are set
    variables = ("MACA_PATH", "MACA_HOME", "MACA_ROOT", "PYTORCH_CUDA_ALLOC_CONF", *TF32_VARIABLES)
    packages = ("flash-mla", "flash-attn", "mcoplib", "triton")
    tunings = Path(__file__).parent / "tuning"
    # `pymxsml`, a wheel of the SDK (/opt/maca/share/mxsml); its unit of power is not documented.
    dialect = Dialect("pymxsml.mxsml_extension", prefix="mxSmlEx", constants="MXSMLEX", milliwatts=False)

    def prepare_device(self) -> None:
        """Keep scaled_dot_product_attention off cuDNN, which this stack does not have."""
        import torch

        switch = getattr(torch.backends.cuda, "enable_cudnn_sdp", None)  # older releases have none
        if switch is not None:
            switch(False)

    def dtypes(self) -> tuple[torch.dtype, ...]:
        import torch

        return (torch.bfloat16, torch.float16, torch.float32)

    def kernels(self) -> Mapping[str, FusedOp]:
        """Return mcFlashMLA, flash-attn built for MACA, and SDPA.

        mcFlashMLA reportedly takes any page size of a power of two; deployments use 64. Unknown: what rows
        without keys give, and if a graph can hold its plans. FlashMLA's first planner has 4095 rows at most.

        Values are padded to the width of keys: SDPA's FlashAttention requires that (check_head_dim_size_flash
        in mcPytorch's sdp_utils.cpp at 2ee4c34), and flash-attn takes it; vLLM-metax calls flash-attn without
        padding, which was not tried here. torch's own varlen operator is not offered, although mcPytorch
        registers it: what the MACA library behind it does with bounds of int32 is not public.
        """
        return {
            "flash_mla": FlashMla(
                LatentLimits(max_rows=4095, empty_rows=False, graph=False), install=KERNELS_HINT
            ),
            "flash_attn": FlashAttnVarlen(install=KERNELS_HINT),
            "sdpa": SdpaExpanded(pads_values=True),
        }

    def default_tuning(self) -> Tuning:
        return TILES


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Metax:
    """Return the MetaX backend."""
    return Metax(options)
