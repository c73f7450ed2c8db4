"""The optional part of `Backend`, implemented through a device's own torch module.

Uses `getattr(torch, device_type)` and never `torch.accelerator`, which several vendor builds
lack or leave incomplete. A CUDA-like plugin is a name, a device type, hints and a probe.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends import host
from mla_backends.api import Availability, Backend, DeviceInfo, MemoryInfo, Timer
from mla_backends.errors import BackendError, BackendOptionError, DeviceUnavailable, describe
from mla_backends.monitor import Monitor
from mla_backends.torch_backend.asking import ask, overheard
from mla_backends.torch_backend.graph import capture
from mla_backends.torch_backend.report import known, report, sensor_facts, set_variables, versions
from mla_backends.torch_backend.timing import EventTimer

if TYPE_CHECKING:
    import torch


class TorchBackend(Backend):
    """A device that torch already knows, as `torch.<device_type>`."""

    device_type: str
    requires: tuple[str, ...] = ()  # modules whose import registers the device with torch
    install_hint = "install the torch build of the device's vendor"
    query_tool = ""  # the command that lists the devices; named in hints and never run
    visibility: tuple[str, ...] = ()  # environment variables that choose devices, highest priority first
    variables: tuple[str, ...] = ()  # further variables that a result should record
    packages: tuple[str, ...] = ()  # distributions whose versions a result should record
    graph_class = ""  # of the torch module: "CUDAGraph"; empty where the stack has none

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self._graphs = self.options.get("graph", "on" if self.graphs_by_default() else "off")
        if self._graphs not in ("on", "off"):
            raise BackendOptionError(f"backend '{self.name}' takes -O graph=on or off, got '{self._graphs}'.")
        self.at_setup: Mapping[str, str] = {}  # the monitor's readings then
        self._host_threads = ""

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "graph") if cls.graph_class else ("threads",)

    @functools.cached_property
    def module(self) -> ModuleType:
        """Return `torch.<device_type>`. Raises AttributeError where torch does not know the device."""
        for name in ("torch", *self.requires):
            importlib.import_module(name)
        module: ModuleType = getattr(importlib.import_module("torch"), self.device_type)
        return module

    def collectives(self) -> str | None:
        """Return what torch registers for the device type; None where that is nothing, or it cannot say."""
        from torch import distributed

        names = getattr(getattr(distributed, "Backend", None), "default_device_backend_map", {})
        found = names.get(self.device_type)
        return None if found is None else str(found)

    # ------------------------------------------------------------------------------------------ probe

    def probe(self) -> Availability:
        """Ask the device's torch module; a subclass that shares a device type must exclude the others."""
        try:
            module = self.module
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything; a probe must not
            return Availability(False, self._import_problem(error), self.install_hint)
        return self.probe_module(module, {})

    def probe_module(self, module: ModuleType, evidence: Mapping[str, str]) -> Availability:
        """Ask `module` whether it has a device; its warnings become part of the reason."""
        call = f"torch.{self.device_type}.is_available()"
        evidence = {**evidence, **set_variables(self.visibility)}
        try:
            with overheard() as remarks:
                available = bool(module.is_available())
        except Exception as error:  # noqa: BLE001
            return Availability(False, f"{call} raised {describe(error)}", self.device_hint(), evidence)
        if not available:
            reason = "; ".join((f"{call} is False", *remarks))
            return Availability(False, reason, self.device_hint(), evidence)
        return Availability(True, evidence={f"torch.{self.device_type}": "available", **evidence})

    def _import_problem(self, error: Exception) -> str:
        """Return why there is no `torch.<device_type>`, as one clause."""
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", *self.requires):
            return f"{error.name} is not installed"
        if isinstance(error, AttributeError) and error.name == self.device_type:
            return f"torch {getattr(error.obj, '__version__', '')} has no torch.{self.device_type}"
        modules = " and ".join(("torch", *self.requires))
        return f"torch.{self.device_type} cannot be used: importing {modules} raised {describe(error)}"

    def device_hint(self) -> str:
        """Return what to check when the software is installed but the device is not found."""
        tool = f"`{self.query_tool}`" if self.query_tool else "the driver"
        found = set_variables(self.visibility)
        if found:
            hiding = " and ".join(f"{name}='{value}'" for name, value in found.items())
            return f"check that {tool} lists the device and that {hiding} does not hide it"
        return f"check that {tool} lists the device and that this container was given it"

    # ------------------------------------------------------------------------------------------ setup

    def setup(self, index: int | None = None) -> torch.device:
        self.set_threads()
        try:
            self._check_index(index)
            self.device = self._start(index)
            self.prepare_device()
        except BackendError:
            raise
        except Exception as error:
            which = "the device" if index is None else f"device {index}"
            reason = f"{which} failed to start: {describe(error)}"
            raise DeviceUnavailable(self.name, reason, self.device_hint()) from error
        if self.monitor is not None:
            self.at_setup = self.monitor.sample()
        return self.device

    def device_count(self) -> int:
        return int(self.module.device_count())

    def _check_index(self, index: int | None) -> None:
        count = self.device_count()
        if count == 0:
            raise DeviceUnavailable(self.name, "torch sees 0 devices", self.device_hint())
        if index is not None and not 0 <= index < count:
            names = " or ".join(self.visibility)
            why = f" ({names} selects the visible ones)" if names else ""
            raise BackendError(
                f"backend '{self.name}' has {count} device(s), so there is no device {index}{why}."
            )

    def _start(self, index: int | None) -> torch.device:
        """Make the device current and use it once: a broken driver fails here and not in the first op."""
        import torch

        if index is not None:
            self.module.set_device(index)
        device = torch.zeros(1, device=self.device_type).device
        self.module.synchronize()
        return device

    def prepare_device(self) -> None:
        """Do what a vendor's stack needs once, right after the device has started."""

    def set_threads(self) -> None:
        """Set how many host threads torch uses, which the float64 check needs: the option, else the limit.

        Without this, torch starts a thread per core of the machine in a container that may use a few.
        """
        import torch

        if "threads" in self.options:
            threads, source = int(self.options["threads"]), "the option threads"
        else:
            threads, source = host.thread_limit(torch.get_num_threads())
        torch.set_num_threads(threads)
        self._host_threads = f"{threads}, {source}"

    def synchronize(self) -> None:
        self.module.synchronize()

    # ------------------------------------------------------------------------------------ time and graphs

    def device_timer(self) -> Timer | None:
        """Return a timer on the device's clock, in addition to `timer()`; None without events that time.

        Raises `BackendError` where making an event fails for another reason.
        """
        if not hasattr(self.module, "Event"):
            return None
        try:
            return EventTimer(self.module, self.device_type, self.synchronize)
        except (TypeError, NotImplementedError):  # such as torch.cpu.Event, which knows no enable_timing
            return None
        except Exception as error:
            raise BackendError(
                f"backend '{self.name}' cannot make a torch.{self.device_type}.Event to time with: "
                f"{describe(error)}."
            ) from error

    def graphs_by_default(self) -> bool:
        """Return whether graphs are captured unless -O graph says otherwise."""
        return True

    @property
    def graphs(self) -> str:
        """Whether functions are captured: "on", "off" by option or default, "none" without support."""
        return self._graphs if self.graph_class and hasattr(self.module, self.graph_class) else "none"

    def graph(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        """Capture `fn` after running it three times, and return its replay.

        None if the stack has no graphs or `-O graph=off` disables them. Raises `BackendError` when `fn`
        cannot be captured.
        """
        if self.graphs != "on":
            return None
        try:
            return capture(self.module, self.graph_class, fn)
        except Exception as error:
            raise BackendError(
                f"backend '{self.name}' cannot capture this into a graph ({describe(error)}); "
                "-O graph=off runs without graphs."
            ) from error

    # ------------------------------------------------------------------------------------------ facts

    def properties(self) -> Any:
        """Return torch's properties of the device, or None if the stack has none."""
        function = getattr(self.module, "get_device_properties", None)
        return function(self.device) if function is not None else None

    def capability(self) -> str | None:
        """Return the capability as text. Its numbers mean something different for every vendor."""
        found = self.properties()
        if not (hasattr(found, "major") and hasattr(found, "minor")):
            return None
        return f"{found.major}.{found.minor}"

    def multiprocessors(self) -> int | None:
        """Return the number of multiprocessors; None if the stack does not report it."""
        return known(self.properties(), "multi_processor_count")

    def native_bfloat16(self) -> bool | None:
        """Return whether the stack reports bfloat16 without emulation; None if it cannot say."""
        function = getattr(self.module, "is_bf16_supported", None)
        try:
            return None if function is None else bool(function(including_emulation=False))
        except TypeError:  # an older torch includes emulation
            return None

    def device_info(self) -> DeviceInfo:
        found = self.properties()
        if found is None:
            return DeviceInfo(name=self.device_type)
        return DeviceInfo(
            name=str(found.name),
            memory_bytes=known(found, "total_memory"),
            cache_bytes=known(found, "L2_cache_size"),
        )

    def memory(self) -> MemoryInfo:
        free, total = ask(self.module, "mem_get_info") or (None, None)
        return MemoryInfo(
            free=free,
            total=total,
            allocated=ask(self.module, "memory_allocated"),
            peak=ask(self.module, "max_memory_allocated"),
        )

    def empty_cache(self) -> None:
        ask(self.module, "empty_cache")

    # ------------------------------------------------------------------------------------ environment

    @functools.cached_property
    def monitor(self) -> Monitor | None:
        """The vendor's management library, or None."""
        return self.make_monitor()

    def make_monitor(self) -> Monitor | None:
        """Return a monitor of the device; subclasses that have a library override this."""
        return None

    def sensors(self) -> Mapping[str, str]:
        return {} if self.monitor is None else self.monitor.sample()

    def vendor_facts(self) -> Mapping[str, str]:
        """Return facts that only this vendor's stack has, for the environment; subclasses override this."""
        return {}

    def environment(self) -> Mapping[str, str]:
        """Report versions, variables and sensors. A part that cannot be read says so."""
        return report(
            {
                "versions": lambda: versions(self.requires, self.packages),
                "device": self._device_facts,
                "variables": lambda: set_variables((*self.visibility, *self.variables)),
                "vendor": self.vendor_facts,
                "sensors": lambda: sensor_facts(self.monitor, self.at_setup),
            }
        )

    def _device_facts(self) -> Mapping[str, str]:
        facts = {
            "device": self.device,
            "device_count": self.module.device_count(),
            "capability": self.capability(),
            "multiprocessors": self.multiprocessors(),
            "graphs": self.graphs,
            "host_threads": self._host_threads,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}
