"""NVIDIA backend: GPUs through PyTorch's CUDA build. Look-alikes of other vendors are refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mla_backend_nvidia.cards import driver_version, peaks, tuning_for
from mla_backend_nvidia.kernels import (
    ADA,
    ahead_of,
    installed_triton,
    kernels,
    old_triton,
    since_ampere,
    starts_early,
)
from mla_backends import Availability, FusedOp, hookimpl
from mla_backends.api import DeviceInfo
from mla_backends.cuda import CudaBackend
from mla_backends.errors import DeviceUnavailable
from mla_backends.known import KNOWN
from mla_backends.monitor import Dialect
from mla_backends.torch_backend import TF32_VARIABLES
from mla_backends.triton_ops import Launcher, TritonBackend, Tuning

if TYPE_CHECKING:
    import torch

__all__ = ["Nvidia", "mla_backend"]

# Words in the names of devices that imitate torch.cuda; old NVIDIA cards do not have NVIDIA in theirs.
FOREIGN = ("metax", "iluvatar", "mthreads", "mtt ", "amd ", "radeon", "hygon", "biren")

# Libraries whose versions change numbers or times; those of CUDA have had no suffix since CUDA 13.
PACKAGES = (
    "sgl-flash-mla", "flash-mla", "tokenspeed-mla", "flashinfer-python", "flashinfer-cubin",
    "flashinfer-jit-cache", "flash-attn", "flash-attn-3", "nvidia-cutlass-dsl", "apache-tvm-ffi", "triton",
    "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip


class Nvidia(TritonBackend, CudaBackend):
    """NVIDIA GPUs. Here, and only here, a capability is the number of an NVIDIA architecture."""

    name = "nvidia"
    api_version = 1
    install_hint = f"install torch, built for CUDA, from {KNOWN['nvidia'].torch_source}"
    query_tool = "nvidia-smi"
    visibility = ("CUDA_VISIBLE_DEVICES",)
    variables = (
        "CUDA_HOME",
        "CUDA_DEVICE_ORDER",
        "CUDA_MODULE_LOADING",
        "PYTORCH_CUDA_ALLOC_CONF",
        *TF32_VARIABLES,
    )
    packages = PACKAGES
    tunings = Path(__file__).parent / "tuning"
    dialect = Dialect("pynvml", by_uuid=True)

    def probe_module(self, module: ModuleType, evidence: Mapping[str, str]) -> Availability:
        with _asking_nvml():
            return super().probe_module(module, evidence)

    def prepare_device(self) -> None:
        """Refuse a device of another vendor that got past the marks of the build."""
        name = str(self.properties().name)
        if any(word in name.lower() for word in FOREIGN):
            reason = f"torch.cuda offers '{name}', not an NVIDIA device"
            raise DeviceUnavailable(self.name, reason, "`mla-bench list` shows the backend that serves it")

    def architecture(self) -> tuple[int, int]:
        """Return the compute capability, (9, 0) for Hopper."""
        properties = self.properties()
        return properties.major, properties.minor

    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self.floats_since((8, 0))

    def device_info(self) -> DeviceInfo:
        info = super().device_info()
        bandwidth, flops = peaks(info.name, info.memory_bytes)
        return replace(info, bandwidth=bandwidth, flops=flops)

    def kernels(self) -> Mapping[str, FusedOp]:
        return kernels(self.architecture(), self.multiprocessors())

    def ahead_of(self) -> Mapping[str, str]:
        return ahead_of(self.architecture())

    def default_tuning(self) -> Tuning:
        return tuning_for(self.shared_memory(), str(self.properties().name), installed_triton()[1])

    def triton_reason(self, device: torch.device) -> str:
        return since_ampere(self.architecture())(device) or old_triton()

    def launcher(self) -> Launcher:
        early = starts_early(self.architecture(), driver_version())
        return Launcher(early, native_e4m3=self.architecture() >= ADA, bounds=True)

    def vendor_facts(self) -> Mapping[str, str]:
        import torch

        more = {"cudnn": torch.backends.cudnn.version(), "driver": driver_version()}
        return {
            **super().vendor_facts(),
            **{name: str(value) for name, value in more.items() if value},
        }


@contextmanager
def _asking_nvml() -> Iterator[None]:
    """Make `torch.cuda.is_available()` ask NVML: the CUDA runtime would start the driver in this process."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Nvidia:
    """Return the NVIDIA backend."""
    return Nvidia(options)
