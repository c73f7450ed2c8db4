"""Iluvatar backend: GPUs through the CoreX build of PyTorch, whose devices are called `cuda`.

What the stack reports about dtypes is unreliable, so a small product decides. Known hazards: float64 is
off in the vendor's kernel libraries, and GELU of a non-contiguous tensor has hung a card. The layer needs
neither; ops for this device must not add them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mla_backends import FusedOp, hookimpl
from mla_backends.cuda import CudaBackend
from mla_backends.errors import DeviceUnavailable
from mla_backends.kernels import IxformerMla, SdpaExpanded
from mla_backends.known import KNOWN
from mla_backends.torch_backend import TF32_VARIABLES, working_dtypes
from mla_backends.triton_ops import Tile, TritonBackend, Tuning

if TYPE_CHECKING:
    import torch

__all__ = ["Iluvatar", "mla_backend"]

GRAPH_VARIABLE = "VLLM_ENFORCE_CUDA_GRAPH"  # the vendor's own deployments set it to allow graphs
# Of the Triton kernels; not run on hardware. Eight warps and no pipeline, as FlagGems has it here; 64 KiB of
# shared memory hold these.
TILES = Tuning(latent={1: Tile(16, 32, 8, 1)}, expanded={1: Tile(64, 32, 8, 1)})


class Iluvatar(TritonBackend, CudaBackend):
    """Iluvatar GPUs."""

    name = "iluvatar"
    api_version = 1
    install_hint = f"install torch from {KNOWN['iluvatar'].torch_source}"
    query_tool = "ixsmi"
    visibility = ("CUDA_VISIBLE_DEVICES",)
    variables = ("COREX_ROOT", GRAPH_VARIABLE, "PYTORCH_CUDA_ALLOC_CONF", *TF32_VARIABLES)
    packages = ("ixformer", "flash-mla", "flash-attn", "triton")
    tunings = Path(__file__).parent / "tuning"

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._refused: Mapping[str, str] = {}  # name of a dtype -> why it is not native

    def graphs_by_default(self) -> bool:
        """Graphs are opt-in on this stack: -O graph=on, or the variable the vendor's deployments use."""
        return os.environ.get(GRAPH_VARIABLE) == "1"

    def prepare_device(self) -> None:
        """Multiply in each dtype once. Raises `DeviceUnavailable` when none of them works."""
        assert self.device is not None  # it has just started
        self._dtypes, self._refused = working_dtypes(self.device, self.synchronize)
        if not self._dtypes:
            reason = f"the device cannot multiply in any floating dtype ({self._refused['float32']})"
            raise DeviceUnavailable(self.name, reason, self.device_hint())

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes whose products were right at setup."""
        return self._dtypes

    def kernels(self) -> Mapping[str, FusedOp]:
        """Return ixformer's attention, one query token per row, and SDPA.

        Which widths CoreX's SDPA serves fast is not public. Values are padded to the width of keys, which
        FlashAttention 2 and its relatives require; not run on hardware.
        """
        return {
            "ixformer": IxformerMla(install="it comes with the CoreX SDK"),
            "sdpa": SdpaExpanded(pads_values=True),
        }

    def default_tuning(self) -> Tuning:
        return TILES

    def vendor_facts(self) -> Mapping[str, str]:
        refused = {f"refused.torch.{name}": why for name, why in self._refused.items()}
        return {**super().vendor_facts(), **refused}


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Iluvatar:
    """Return the Iluvatar backend."""
    return Iluvatar(options)
