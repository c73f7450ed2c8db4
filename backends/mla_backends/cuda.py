"""Devices available as `torch.cuda`: whose they are, and what they have in common.

Several vendors build torch so that their device is `cuda`. They are told apart by marks of the build, never
by what the device can do, and never by environment variables or tools alone: hosts have several SDKs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mla_backends.api import Availability
from mla_backends.known import KNOWN
from mla_backends.torch_backend import TorchBackend

Marks = dict[str, str]  # what was looked at -> what was seen


@dataclass(frozen=True)
class Build:
    """Whose device `torch.cuda` is in the torch that is installed."""

    backend: str  # name of the backend that serves it; "" if none does
    description: str  # completes "this torch is ..."
    marks: Mapping[str, str]


def cuda_build() -> Build:
    """Return whose build of torch this is, from marks alone. Raises whatever importing torch raises."""
    import torch

    for backend, description, find in _BUILDS:
        marks = find(torch)
        if marks:
            return Build(backend, description, marks)
    return Build("", "built without CUDA", {"torch.version.cuda": "None"})


def _torchada(torch: ModuleType) -> Marks:
    """Once imported, torchada redirects torch.cuda to musa."""
    return {"torchada": "imported"} if "torchada" in sys.modules else {}


def _corex(torch: ModuleType) -> Marks:
    marks = {"torch.corex": "True"} if getattr(torch, "corex", False) else {}
    return marks | _local_version(torch, "+corex")


def _maca(torch: ModuleType) -> Marks:
    marks = _local_version(torch, "+metax")
    internal: Any = sys.modules.get("torch._utils_internal")
    if hasattr(internal, "USE_MACA"):
        marks["torch._utils_internal.USE_MACA"] = str(internal.USE_MACA)
    # Read as a file: to import it takes longer than a probe may.
    source = Path(str(torch.__file__)).parent / "utils" / "cpp_extension.py"
    if source.is_file() and b"MACA_HOME" in source.read_bytes():
        marks["torch.utils.cpp_extension.MACA_HOME"] = "exists"
    return marks


def _built_for(name: str, torch: ModuleType) -> Marks:
    version = getattr(torch.version, name, None)
    return {f"torch.version.{name}": str(version)} if version else {}


def _local_version(torch: ModuleType, suffix: str) -> Marks:
    version = str(torch.__version__)
    return {"torch.__version__": version} if suffix in version else {}


# Those that imitate NVIDIA come first: most of them set `torch.version.cuda` as well.
_BUILDS: tuple[tuple[str, str, Callable[[ModuleType], Marks]], ...] = (
    ("moore", "redirected by torchada to Moore Threads' torch.musa", _torchada),
    ("iluvatar", "Iluvatar's CoreX build", _corex),
    ("metax", "MetaX's MACA build", _maca),
    ("", "a ROCm build", partial(_built_for, "hip")),
    ("nvidia", "NVIDIA's CUDA build", partial(_built_for, "cuda")),
)


class CudaBackend(TorchBackend):
    """A vendor whose devices are `torch.cuda`. Subclasses set `name` to the one in the table above."""

    device_type = "cuda"
    graph_class = "CUDAGraph"

    def probe(self) -> Availability:
        """Accept this vendor's build of torch only, then ask it for a device."""
        try:
            build = cuda_build()
            module = self.module
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything; a probe must not
            return Availability(False, self._import_problem(error), self.install_hint)
        if build.backend != self.name:
            return Availability(False, *self._foreign(build), build.marks)
        return self.probe_module(module, build.marks)

    def _foreign(self, build: Build) -> tuple[str, str]:
        """Return reason and hint for a torch that is not this vendor's."""
        seen = ", ".join(f"{mark} {value}" for mark, value in build.marks.items())
        reason = f"this torch is {build.description} ({seen})"
        if not build.backend:
            return reason, self.install_hint
        hint = f"use `--backend {build.backend}` for {KNOWN[build.backend].device}, or {self.install_hint}"
        return f"{reason} and its cuda devices are not this backend's", hint

    def vendor_facts(self) -> Mapping[str, str]:
        return {f"mark.{name}": value for name, value in cuda_build().marks.items()}
