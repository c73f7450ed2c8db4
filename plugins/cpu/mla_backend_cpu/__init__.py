"""CPU backend: the device every host has, with kernels compiled for the processor at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mla_backend_cpu.catalog import facts, native_ops, tell, told
from mla_backend_cpu.compilation import EMULATED, LEVELS
from mla_backend_cpu.recorded import sequence
from mla_backends import Availability, Backend, BackendError, BackendOptionError, FusedOp, hookimpl, host
from mla_backends.api import DeviceInfo, MemoryInfo, OpCall

if TYPE_CHECKING:
    import torch

__all__ = ["Cpu", "mla_backend"]

NATIVE_VARIABLE = "MLA_CPU_NATIVE"  # the default of -O native


class Cpu(Backend):
    """Every CPU that torch runs on."""

    name = "cpu"
    api_version = 1

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self._native = self.options.get("native", os.environ.get(NATIVE_VARIABLE) or "auto")
        self._ops: dict[str, FusedOp] = {}
        self._threads_from = "not set up"
        *levels, last = ("auto", "off", *(level.name for level in LEVELS))
        if self._native not in (*levels, last, EMULATED):
            where = "" if "native" in self.options else f" from {NATIVE_VARIABLE}"
            raise BackendOptionError(
                f"backend 'cpu' takes -O native={', '.join(levels)} or {last}, got '{self._native}'{where}."
            )

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "native")

    def probe(self) -> Availability:
        return Availability(True, evidence={"processor": host.processor_name()})

    def setup(self, index: int | None = None) -> torch.device:
        import torch

        if index not in (None, 0):
            raise BackendError(f"backend 'cpu' has no device {index}: it has 1, numbered from 0.")
        _, self._threads_from = host.set_threads(self.options)
        self._ops = native_ops(self._native)
        return torch.device("cpu")

    def collectives(self) -> str:
        return "gloo"

    def synchronize(self) -> None:
        """Return at once: torch's CPU ops are done when they return."""

    def device_info(self) -> DeviceInfo:
        return host.device_info()

    def dtypes(self) -> tuple[torch.dtype, ...]:
        import torch

        return (torch.bfloat16, torch.float16, torch.float32)

    def memory(self) -> MemoryInfo:
        return host.memory()

    def remarks(self) -> Sequence[str]:
        return told(self._native)

    def ops(self) -> Mapping[str, FusedOp]:
        if self._ops:  # a runner has asked for the remarks before; a program that makes a layer may not
            tell(self._native)
        return self._ops

    def sequence(self, calls: Sequence[OpCall], moving: Sequence[torch.Tensor]) -> Callable[..., None] | None:
        return sequence(calls, moving)

    def environment(self) -> Mapping[str, str]:
        import torch

        return {
            "threads": str(torch.get_num_threads()),
            "threads_from": self._threads_from,
            "cpu_limit": str(host.cpu_limit()),
            **facts(self._native),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Cpu:
    """Return the CPU backend."""
    return Cpu(options)
