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


_BACKENDS = (
    KnownBackend(
        "cpu", "any CPU that PyTorch runs on",
        "PyPI or, without CUDA libraries, https://download.pytorch.org/whl/cpu",
    ),
    KnownBackend("nvidia", "NVIDIA GPUs", "PyPI", also=("cuda",)),
    KnownBackend(
        "moore", "Moore Threads GPUs, through torch_musa",
        "Moore Threads' container images or https://github.com/MooreThreads/torch_musa",
        also=("musa", "mthreads"),
    ),
    KnownBackend(
        "metax", "MetaX GPUs, through the MACA SDK",
        "MetaX's own wheel index for the MACA SDK (its version contains +metax)", also=("maca",),
    ),
    KnownBackend(
        "iluvatar", "Iluvatar GPUs, through the CoreX SDK",
        "Iluvatar's CoreX SDK (its version contains +corex)", also=("corex",),
    ),
)  # fmt: skip
KNOWN: Mapping[str, KnownBackend] = MappingProxyType({backend.name: backend for backend in _BACKENDS})


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
        name = self.torch_device
        return "" if name == "cuda" else f"python -m mla.bench new-backend {name} ./{name}"


# Flags, torch devices and packages as in InfiniCore at 2cec6ce6 (test/infinicore/framework).
_DEVICES = (
    KnownDevice("cambricon", "Cambricon MLUs", "mlu", "torch_mlu"),
    KnownDevice("ascend", "Huawei Ascend NPUs", "npu", "torch_npu", also=("huawei",)),
    KnownDevice("kunlun", "Kunlun XPUs", "cuda", "torch_xmlir", "torch_xmlir"),
    KnownDevice("hygon", "Hygon DCUs", "cuda", "Hygon's torch for DTK", also=("dcu", "dtk")),
    KnownDevice("qy", "QY GPUs", "cuda", "their vendor's torch"),
    KnownDevice("ali", "Alibaba PPUs", "cuda", "the torch of their SDK", also=("ppu", "alibaba")),
)
WITHOUT_PLUGIN: Mapping[str, KnownDevice] = MappingProxyType({device.name: device for device in _DEVICES})
