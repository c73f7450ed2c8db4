"""MetaX backend: GPUs through the MACA build of PyTorch, whose devices are called `cuda`.

The capability it reports collides with NVIDIA's numbers (a C500 may say 8, 9 or 10), so it is text here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mla_backend_metax.kernels import DEFAULTS, kernels
from mla_backends import FusedOp, hookimpl
from mla_backends.cuda import CudaBackend
from mla_backends.known import KNOWN
from mla_backends.monitor import Address, Dialect, Monitor, NvmlSampler
from mla_backends.torch_backend import TF32_VARIABLES
from mla_backends.triton_ops import Tuning
from mla_backends.triton_ops.backend import TritonBackend

if TYPE_CHECKING:
    import torch

__all__ = ["Metax", "mla_backend"]


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

    def prepare_device(self) -> None:
        """Keep scaled_dot_product_attention off cuDNN, which this stack does not have."""
        import torch

        super().prepare_device()
        switch = getattr(torch.backends.cuda, "enable_cudnn_sdp", None)  # older releases have none
        if switch is not None:
            switch(False)

    def dtypes(self) -> tuple[torch.dtype, ...]:
        import torch

        return (torch.bfloat16, torch.float16, torch.float32)

    def kernels(self) -> Mapping[str, FusedOp]:
        return kernels()

    def default_tuning(self) -> Tuning:
        return DEFAULTS

    def make_monitor(self) -> Monitor:
        """Use `pymxsml`, a wheel of the SDK (/opt/maca/share/mxsml); its unit of power is not documented."""
        dialect = Dialect("pymxsml.mxsml_extension", prefix="mxSmlEx", constants="MXSMLEX", milliwatts=False)
        return Monitor(NvmlSampler(dialect, self._address))

    def _address(self) -> Address:
        chosen = (os.environ[name] for name in self.visibility if name in os.environ)
        return Address(self.module.current_device(), visible=next(chosen, None))


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Metax:
    """Return the MetaX backend."""
    return Metax(options)
