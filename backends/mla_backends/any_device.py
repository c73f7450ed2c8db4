"""The backend `torch`: the reference ops on any device that has a torch module, without a plugin.

So a new card gets a checked number. Nothing about it is known beforehand: its functions may be missing, raise
or lie, and what it can do is found out by trying.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends import host
from mla_backends.api import Availability, DeviceInfo, MemoryInfo, Timer
from mla_backends.cuda import cuda_build
from mla_backends.errors import BackendOptionError, DeviceUnavailable, describe, plugin_code
from mla_backends.known import GENERAL, KNOWN
from mla_backends.registry import entries, hookimpl
from mla_backends.torch_backend import TF32_VARIABLES, TorchBackend, ask, attempt, whole, working_dtypes

if TYPE_CHECKING:
    import torch

# Names under which people know a device -> torch's name of its module. A ROCm build calls it cuda.
ALIASES = {"hip": "cuda", "rocm": "cuda"}
SLEEP_MS = 20.0
# A pause of SLEEP_MS measured with events: clocks drift, and another unit is off by a factor of 1000.
MIN_SHARE, MAX_SHARE = 0.8, 1.2
_DEVICE = re.compile(r"([a-z][a-z0-9_]*)(?::(\d{1,4}))?")


@hookimpl
def mla_backend(options: Mapping[str, str]) -> AnyDevice:
    """Return the backend for the device that `-O device` names."""
    return AnyDevice(options)


class AnyDevice(TorchBackend):
    """The device that `-O device=NAME` names, else the one accelerator that torch reports.

    `-O import=MODULE` names the package that brings it, unless it is `torch_NAME` or loaded by torch.
    There are no fused ops, and graphs only with `-O graph=on`.
    """

    name = GENERAL
    api_version = 1
    variables = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTORCH_ENABLE_MPS_FALLBACK", *TF32_VARIABLES)

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        wanted = self.options.get("device")
        self.device_type, self._index = ("", None) if wanted is None else parse(wanted)
        self._how = f"named by -O device={wanted}" if wanted else "the accelerator that torch reports"
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._left_out: Mapping[str, str] = {}
        self._clock_problem = "the device is not set up"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("device", "import", "graph", "threads")

    def graphs_by_default(self) -> bool:
        """Return False: whether a stack's capture can be relied on is not known beforehand."""
        return False

    # ------------------------------------------------------------------------------------------ probe

    @functools.cached_property
    def module(self) -> ModuleType:
        """The device's torch module. Raises `DeviceUnavailable`, and whatever importing torch raises."""
        torch, extension = importlib.import_module("torch"), self.options.get("import", "")
        if extension:
            _import(extension, f"-O import={extension} names it")
        self.device_type, module = find(torch, self.device_type or _reported(torch), extension)
        self.graph_class = f"{self.device_type.upper()}Graph"
        bringer = extension or f"torch_{self.device_type}"
        self.requires = (bringer,) if bringer in sys.modules else ()
        return module

    def probe(self) -> Availability:
        try:
            module = self.module
        except DeviceUnavailable as why:
            return Availability(False, why.reason, why.hint)
        except Exception as error:  # noqa: BLE001  # a torch that does not import raises anything
            return Availability(False, self._import_problem(error), self.install_hint)
        evidence = {"device": f"{self.device_type}, {self._how}"}
        if self.requires:
            evidence["extension"] = self.requires[0]
        if not hasattr(module, "is_available"):
            return Availability(True, evidence={**evidence, "is_available": "missing; setup will tell"})
        return self.probe_module(module, evidence)

    def device_hint(self) -> str:
        """Return what to check: most often, that torch is the wrong build."""
        import torch

        build = f"that this torch ({torch.__version__}) is built for {self.device_type}"
        return f"check {build}, that the driver lists the device and that this container was given it"

    # ------------------------------------------------------------------------------------------ setup

    def device_count(self) -> int | None:
        """Return None where `-O device` names an index: tasks are then not spread over the devices."""
        return self.visible_devices() if self._index is None else None

    def visible_devices(self) -> int | None:
        return whole(ask(self.module, "device_count"))

    def _check_index(self, index: int | None, count: int | None) -> None:
        super()._check_index(index, self.visible_devices())  # which counts beside an index in `-O device` too

    def setup(self, index: int | None = None) -> torch.device:
        if None not in (index, self._index) and index != self._index:
            raise BackendOptionError(
                f"-O device={self.options['device']} and --device {index} name different devices."
            )
        return super().setup(self._index if index is None else index)

    def prepare_device(self) -> None:
        """Try what the device can do."""
        needed = (self.graph_class, "graph", "Stream", "stream", "current_stream")
        if absent := ", ".join(name for name in needed if not hasattr(self.module, name)):
            self.graph_class = ""
            if self.options.get("graph") == "on":
                raise BackendOptionError(
                    f"-O graph=on: torch.{self.device_type} lacks what a capture needs ({absent}): "
                    "leave the option out."
                )
        assert self.device is not None  # it has just started
        self._dtypes, self._left_out = working_dtypes(self.device, self.synchronize)
        if not self._dtypes:
            problems = "; ".join(f"{name}: {why}" for name, why in self._left_out.items())
            hint = "update torch and the package that brings the device"
            raise DeviceUnavailable(self.name, f"no product comes out right on it ({problems})", hint)
        self._clock_problem = clock_problem(self.module, self.device_type, self.synchronize)

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes in which a product works. Which of them are native, torch does not say."""
        return self._dtypes

    def device_timer(self) -> Timer | None:
        return None if self._clock_problem else super().device_timer()

    # ------------------------------------------------------------------------------------------ facts

    def properties(self) -> Any:
        return ask(self.module, "get_device_properties", self.device)

    def device_info(self) -> DeviceInfo:
        """Describe the device as far as its module does; the host describes a CPU."""
        if self.device_type == "cpu":
            return host.device_info()
        properties = self.properties()
        name = getattr(properties, "name", None) or ask(self.module, "get_device_name", self.device)
        text = name.strip() if isinstance(name, str) else ""
        return DeviceInfo(
            name=f"{text} ({self.device_type})" if text else self.device_type,
            memory_bytes=whole(getattr(properties, "total_memory", None)) or self.memory().total,
            cache_bytes=whole(getattr(properties, "L2_cache_size", None)) or None,
        )

    def memory(self) -> MemoryInfo:
        """Return the counters that torch has, under any of their names; the host's for a CPU."""
        if self.device_type == "cpu":
            return host.memory()
        known, counted = super().memory(), functools.partial(ask, self.module)
        allocated = whole(counted("current_allocated_memory")) if known.allocated is None else known.allocated
        free, total = known.free, known.total or whole(counted("recommended_max_memory"))
        if total and not known.total:  # of unified memory
            held = whole(counted("driver_allocated_memory")) or allocated
            free = None if held is None else max(0, total - held)
        return replace(known, free=free if total else None, total=total or None, allocated=allocated)

    def remarks(self) -> Sequence[str]:
        """Name a device that was not chosen, and the backend of this project that is made for it."""
        said = [] if "device" in self.options else [f"device {self.device}: {self._how} (-O device= chooses)"]
        names = [known.name for known in KNOWN.values() if self.device_type in (known.name, *known.also)]
        for name in names if self.device_type != "cuda" else filter(None, [cuda_build().backend]):
            installed = any(entry.name == name for entry in entries())
            use = f"`--backend {name}`" if installed else f"{KNOWN[name].install}, and `--backend {name}`"
            said.append(f"backend '{name}' is made for this device and has ops of its own: {use}")
        return said

    def vendor_facts(self) -> Mapping[str, str]:
        tried = ", ".join(str(dtype).removeprefix("torch.") for dtype in self._dtypes)
        return {
            "device_type": self.device_type,
            "device_from": self._how,
            "ops": "reference only",
            "dtypes": f"{tried} (tried; which of them are native is unknown)",
            **{f"dtypes.{name}": f"left out: {why}" for name, why in self._left_out.items()},
            "device_clock": f"none: {self._clock_problem}" if self._clock_problem else "events",
        }


# ------------------------------------------------------------------------------------------- finding it
def parse(text: str) -> tuple[str, int | None]:
    """Split "xpu:1" into type and index. Raises `BackendOptionError`."""
    match = _DEVICE.fullmatch(text.strip().lower())
    if match is None:
        raise BackendOptionError(
            f"backend '{GENERAL}' takes -O device=NAME or NAME:INDEX, such as xpu or xpu:1, got '{text}'."
        )
    return match[1], None if match[2] is None else int(match[2])


def find(torch: ModuleType, name: str, extension: str) -> tuple[str, ModuleType]:
    """Return torch's name of the device called `name`, and its module, which `extension` may have brought.

    Imports the package that brings a device to torch, whose name custom gives. Raises `DeviceUnavailable`.
    """
    if name in ALIASES and not getattr(torch.version, "hip", None):
        reason = f"this torch is not a ROCm build (torch.version.hip is None), so it has no {name} device"
        raise DeviceUnavailable(GENERAL, reason, f"install torch's build for ROCm, or {_choices(torch)}")
    device_type = ALIASES.get(name, name)
    lacks, bringer = f"torch {torch.__version__} has no torch.{device_type}", f"torch_{device_type}"
    named = f"name the module that registers it with -O import=MODULE, or {_choices(torch)}"
    module = _module(torch, device_type)
    if module is None and not extension:
        _import(bringer, f"install the package that brings it; {named}", f"{lacks}, and ")
        module = _module(torch, device_type)
    if module is None:
        raise DeviceUnavailable(
            GENERAL, f"{lacks}, and importing {extension or bringer} does not bring it", named
        )
    if not callable(getattr(module, "synchronize", None)):
        reason = f"torch.{device_type} has no synchronize(), so a clock would stop before the work is done"
        raise DeviceUnavailable(GENERAL, reason, "update the package that brings the device")
    return device_type, module


def _module(torch: ModuleType, device_type: str) -> Any:
    """Return `torch.<device_type>` if that is a device's module (`torch.nn` is not), else None."""
    return getattr(torch, device_type, None) if attempt(torch.device, device_type) else None


def _import(package: str, hint: str, prefix: str = "") -> None:
    """Import `package`. Raises `DeviceUnavailable`."""
    try:
        with plugin_code():
            importlib.import_module(package)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]
        why = f"{package} is not installed" if missing else f"importing {package} raised {describe(error)}"
        raise DeviceUnavailable(GENERAL, prefix + why, hint) from error


def _reported(torch: ModuleType) -> str:
    """Return the one accelerator that is here. Raises `DeviceUnavailable`: nothing is guessed."""
    here = [name for name in _device_modules(torch) if name != "cpu" and _is_here(torch, name)]
    if len(here) == 1:
        return here[0]
    seen = f"several accelerators ({', '.join(here)})" if here else "no accelerator"
    raise DeviceUnavailable(GENERAL, f"torch {torch.__version__} reports {seen}", _choices(torch))


def _device_modules(torch: ModuleType) -> list[str]:
    """Return the device types for which this torch has a module, whether or not there is a device."""
    modules = [name for name, value in vars(torch).items() if isinstance(value, ModuleType)]
    return sorted(name for name in modules if not name.startswith("_") and _module(torch, name))


def _is_here(torch: ModuleType, device_type: str) -> bool:
    module = getattr(torch, device_type)
    return bool(ask(module, "is_available" if hasattr(module, "is_available") else "device_count"))


def _choices(torch: ModuleType) -> str:
    """Return how to name a device, and which ones there are."""
    modules = _device_modules(torch)
    here = [name for name in modules if _is_here(torch, name)]
    absent = ", ".join(name for name in modules if name not in here)
    known = f"; this torch also knows {absent}" if absent else ""
    return f"choose a device with -O device=NAME (available here: {', '.join(here) or 'none'}{known})"


# --------------------------------------------------------------------------------------- what it can do
def clock_problem(module: ModuleType, device_type: str, synchronize: Callable[[], Any]) -> str:
    """Time a pause with two events; return why they are no clock, or "" if they are one."""
    if not hasattr(module, "Event"):
        return f"torch.{device_type} has no Event"
    try:
        first, last = (module.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        first.record()
        synchronize()  # so that a lazy queue, too, reaches the first event before the pause
        time.sleep(SLEEP_MS / 1e3)
        last.record()
        synchronize()
        passed = 1e3 * (time.perf_counter() - start)
        measured = float(first.elapsed_time(last))
    except Exception as error:  # noqa: BLE001  # several stacks have an Event that cannot time
        return f"torch.{device_type}.Event cannot time: {describe(error)}"
    if math.isfinite(measured) and MIN_SHARE * SLEEP_MS <= measured <= MAX_SHARE * passed + 1:
        return ""
    return f"torch.{device_type}.Event called a pause of {passed:.1f} ms {measured:.3g} ms"
