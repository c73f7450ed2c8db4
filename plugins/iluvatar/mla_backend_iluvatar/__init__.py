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

from mla_backend_iluvatar.kernels import DEFAULTS, kernels, refusal
from mla_backends import FusedOp, hookimpl
from mla_backends.cuda import CudaBackend
from mla_backends.errors import DeviceUnavailable
from mla_backends.known import KNOWN
from mla_backends.torch_backend import TF32_VARIABLES
from mla_backends.triton_ops import Tuning
from mla_backends.triton_ops.backend import TritonBackend

if TYPE_CHECKING:
    import torch

__all__ = ["Iluvatar", "mla_backend"]

GRAPH_VARIABLE = "VLLM_ENFORCE_CUDA_GRAPH"  # the vendor's own deployments set it to allow graphs


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
        self._refusals: dict[torch.dtype, str] = {}  # dtype -> why it is not native, "" if it is

    def graphs_by_default(self) -> bool:
        """Graphs are opt-in on this stack: -O graph=on, or the variable the vendor's deployments use."""
        return os.environ.get(GRAPH_VARIABLE) == "1"

    def prepare_device(self) -> None:
        """Multiply in each dtype once. Raises `DeviceUnavailable` when none of them works."""
        import torch

        super().prepare_device()
        device = torch.device("cuda", self.module.current_device())
        candidates = (torch.bfloat16, torch.float16, torch.float32)
        self._refusals = {dtype: refusal(dtype, device) for dtype in candidates}
        if all(self._refusals.values()):
            reason = f"the device cannot multiply in any floating dtype ({self._refusals[torch.float32]})"
            raise DeviceUnavailable(self.name, reason, self.device_hint())

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes whose products were right at setup."""
        return tuple(dtype for dtype, why in self._refusals.items() if not why)

    def kernels(self) -> Mapping[str, FusedOp]:
        return kernels()

    def default_tuning(self) -> Tuning:
        return DEFAULTS

    def vendor_facts(self) -> Mapping[str, str]:
        refused = {str(dtype): why for dtype, why in self._refusals.items() if why}
        return {**super().vendor_facts(), **{f"refused.{name}": why for name, why in refused.items()}}


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Iluvatar:
    """Return the Iluvatar backend."""
    return Iluvatar(options)
