"""Moore Threads backend: GPUs through torch_musa, as `torch.musa`.

Nothing here touches `torch.cuda`: under torchada it is a mirror of `torch.musa`, and without it, nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mla_backend_moore.kernels import TILES, kernels
from mla_backends import FusedOp, hookimpl
from mla_backends.api import DeviceInfo, Peak
from mla_backends.known import KNOWN
from mla_backends.monitor import Dialect, NvmlSampler
from mla_backends.triton_ops import TritonBackend, Tuning

if TYPE_CHECKING:
    import torch

__all__ = ["Moore", "mla_backend"]

# The first capability, in Moore Threads' own numbering, that computes bfloat16: MTT S4000.
FIRST_WITH_BFLOAT16 = (2, 2)
BANDWIDTH = "memory_bandwidth_gb_s"  # name of the fact


class MtmlSampler(NvmlSampler):
    """NVML's names over MTML (module `pymtml`), and the bandwidth, which NVML does not report."""

    def facts(self) -> Mapping[str, str]:
        facts = dict(super().facts())
        with suppress(Exception):  # not every driver knows it
            library, device = self.library, self.device
            with library.mtmlMemoryContext(device) as memory:
                bandwidth = int(library.mtmlMemoryGetBandwidth(memory))
            if bandwidth:
                facts[BANDWIDTH] = str(bandwidth)
        return facts


class Moore(TritonBackend):
    """Moore Threads GPUs."""

    name = "moore"
    api_version = 1
    device_type = "musa"
    requires = ("torch_musa",)  # usually loaded by torch itself; not with TORCH_DEVICE_BACKEND_AUTOLOAD=0
    install_hint = f"install torch and torch_musa from {KNOWN['moore'].torch_source}"
    query_tool = "mthreads-gmi"
    visibility = ("MUSA_VISIBLE_DEVICES",)
    variables = ("MUSA_HOME", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTORCH_MUSA_ALLOC_CONF")
    packages = ("torch-musa", "torchada", "mate", "triton")
    tunings = Path(__file__).parent / "tuning"
    dialect = Dialect("pymtml")
    sampler = MtmlSampler
    graph_class = "MUSAGraph"

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the native dtypes. MTT S80 and S3000 can store bfloat16, but their ops then fail."""
        return self.floats_since(FIRST_WITH_BFLOAT16)

    def kernels(self) -> Mapping[str, FusedOp]:
        return kernels(self.capability)

    def default_tuning(self) -> Tuning:
        return TILES

    def device_info(self) -> DeviceInfo:
        """Describe the device. The bandwidth is the management library's; no data sheet is public."""
        reported = self.monitor.facts().get(BANDWIDTH) if self.monitor else None
        peak = Peak(1e9 * float(reported), "mtmlMemoryGetBandwidth, mthreads-ml-py") if reported else None
        return replace(super().device_info(), bandwidth=peak)

    def vendor_facts(self) -> Mapping[str, str]:
        import torch

        version = getattr(torch.version, "musa", None)
        return {**super().vendor_facts(), **({"torch.version.musa": str(version)} if version else {})}


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Moore:
    """Return the Moore Threads backend."""
    return Moore(options)
