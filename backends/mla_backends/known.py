"""The backends this project knows by name, installed or not. Pure data, for messages that can help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# The backend that every installation of this package brings: any torch device, without a plugin.
GENERAL = "torch"
# Devices that torch or an extension of it serves, asked for as if they were backends of their own.
GENERAL_DEVICES = ("xpu", "mps", "mtia", "npu", "hpu", "mlu", "xla", "hip", "rocm")
GENERAL_USE = f"`--backend {GENERAL} -O device=NAME` runs on any torch device"


@dataclass(frozen=True)
class KnownBackend:
    """What to tell a user who asks for a backend that is not installed."""

    name: str
    device: str  # one line
    torch_source: str  # completes "torch from ..."
    also: tuple[str, ...] = ()  # other words users try for it

    @property
    def distribution(self) -> str:
        """Name of the distribution that provides the backend."""
        return f"mla-backend-{self.name}"

    @property
    def folder(self) -> str:
        """Where its source is in a checkout."""
        return f"./plugins/{self.name}"

    @property
    def install(self) -> str:
        """How to install it: with what it requires in a checkout or, once there is a release, by its name."""
        return (
            f"`pip install . ./backends {self.folder}` in a checkout "
            f"(once released, `pip install {self.distribution}`)"
        )


KNOWN: Mapping[str, KnownBackend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            KnownBackend(
                name="cpu",
                device="any CPU that PyTorch runs on",
                torch_source="PyPI or, without CUDA libraries, https://download.pytorch.org/whl/cpu",
            ),
            KnownBackend(
                name="nvidia",
                device="NVIDIA GPUs",
                torch_source="PyPI",
                also=("cuda",),
            ),
            KnownBackend(
                name="moore",
                device="Moore Threads GPUs, through torch_musa",
                torch_source="Moore Threads' container images or https://github.com/MooreThreads/torch_musa",
                also=("musa", "mthreads"),
            ),
            KnownBackend(
                name="metax",
                device="MetaX GPUs, through the MACA SDK",
                torch_source="MetaX's own wheel index for the MACA SDK (its version contains +metax)",
                also=("maca",),
            ),
            KnownBackend(
                name="iluvatar",
                device="Iluvatar GPUs, through the CoreX SDK",
                torch_source="Iluvatar's CoreX SDK (its version contains +corex)",
                also=("corex",),
            ),
        )
    }
)


@dataclass(frozen=True)
class KnownDevice:
    """What to tell a user who asks for a device that this project has no plugin for."""

    name: str  # as the flags of InfiniCore's tests call it
    device: str  # plural, fits "there is no plugin for ..."
    torch_device: str  # what torch calls it
    torch: str  # the build of torch, or the package beside it, that brings the device
    package: str = ""  # what must be imported first, if torch does not do so itself
    also: tuple[str, ...] = ()  # other words users try for it

    @property
    def command(self) -> str:
        """The command that measures the device today."""
        imported = f" -O import={self.package}" if self.package else ""
        return f"python -m mla.bench --backend {GENERAL} -O device={self.torch_device}{imported}"

    @property
    def plugin_command(self) -> str:
        """The command that starts a plugin; "" where torch says cuda, which the template is not for."""
        torch_device = self.torch_device
        return (
            ""
            if torch_device == "cuda"
            else f"python -m mla.bench new-backend {torch_device} ./{torch_device}"
        )


# Flags, torch devices and packages as in InfiniCore at 2cec6ce6 (test/infinicore/framework).
WITHOUT_PLUGIN: Mapping[str, KnownDevice] = MappingProxyType(
    {
        device.name: device
        for device in (
            KnownDevice("cambricon", "Cambricon MLUs", "mlu", "torch_mlu"),
            KnownDevice("ascend", "Huawei Ascend NPUs", "npu", "torch_npu", also=("huawei",)),
            KnownDevice("kunlun", "Kunlun XPUs", "cuda", "torch_xmlir", "torch_xmlir"),
            KnownDevice("hygon", "Hygon DCUs", "cuda", "Hygon's torch for DTK", also=("dcu", "dtk")),
            KnownDevice("qy", "QY GPUs", "cuda", "their vendor's torch"),
            KnownDevice("ali", "Alibaba PPUs", "cuda", "the torch of their SDK", also=("ppu", "alibaba")),
        )
    }
)
