"""The optional part of `Backend`, implemented through a device's own torch module.

Uses `getattr(torch, device_type)` and never `torch.accelerator`, which several vendor builds
lack or leave incomplete. A CUDA-like plugin is a name, a device type, hints and a probe.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends import host
from mla_backends.api import Availability, Backend, DeviceInfo, MemoryInfo, Timer
from mla_backends.errors import BackendError, BackendOptionError, DeviceUnavailable, describe
from mla_backends.monitor import Address, Dialect, Monitor, NvmlSampler

if TYPE_CHECKING:
    import torch


# What a torch module and the runtime below it say of a driver that is too old for this torch.
OUTDATED_DRIVER = re.compile(
    r"driver on your system is too old"
    r"|driver version is insufficient"
    r"|unsupported display driver"
    r"|forward compatibility was attempted"
    r"|unsupported toolchain",
    re.IGNORECASE,
)


class TorchBackend(Backend):
    """A device that torch already knows, as `torch.<device_type>`."""

    device_type: str  # what `torch.device` calls it, such as "xpu"; `torch.xpu` is its module then
    requires: tuple[str, ...] = ()  # modules whose import registers the device with torch
    install_hint = "install the torch build of the device's vendor"
    query_tool = ""  # the command that lists the devices; named in hints and never run
    visibility: tuple[str, ...] = ()  # environment variables that choose devices, highest priority first
    variables: tuple[str, ...] = ()  # further variables that a result should record
    packages: tuple[str, ...] = ()  # distributions whose versions a result should record
    graph_class = ""  # of the torch module: "CUDAGraph"; empty where the stack has none
    dialect: Dialect | None = None  # of the vendor's management library, if it has NVML's functions
    sampler: type[NvmlSampler] = NvmlSampler

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
        name = names.get(self.device_type)
        return None if name is None else str(name)

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
            reason = "" if available else "; ".join((f"{call} is False", *remarks))
        except Exception as error:  # noqa: BLE001
            reason = f"{call} raised {describe(error)}"
        if reason:
            return Availability(False, reason, self.cure(reason) or self.device_hint(), evidence)
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
        if chosen := set_variables(self.visibility):
            hiding = " and ".join(f"{name}='{value}'" for name, value in chosen.items())
            return f"check that {tool} lists the device and that {hiding} does not hide it"
        return f"check that {tool} lists the device and that this container was given it"

    def cure(self, reason: str) -> str:
        """Return what to do about a driver that is too old, which may pass the probe; "" for others."""
        import torch

        older = f"a torch older than {torch.__version__} that the driver supports"
        return f"update the driver, or install {older}" if OUTDATED_DRIVER.search(reason) else ""

    # ------------------------------------------------------------------------------------------ setup

    def setup(self, index: int | None = None) -> torch.device:
        threads, source = host.set_threads(self.options)  # for the float64 check
        self._host_threads = f"{threads}, {source}"
        try:
            self._check_index(index, self.device_count())
            self.device = self._start(index)
            forbid_tf32()
            self.prepare_device()
        except DeviceUnavailable as error:
            if hint := self.cure(error.reason):
                raise DeviceUnavailable(self.name, error.reason, hint, error.evidence) from error
            raise
        except BackendError:
            raise
        except Exception as error:
            which = "the device" if index is None else f"device {index}"
            reason = f"{which} failed to start: {describe(error)}"
            raise DeviceUnavailable(self.name, reason, self.cure(reason) or self.device_hint()) from error
        self.at_setup = self.sensors()
        return self.device

    def device_count(self) -> int | None:
        return self.visible_devices()

    def visible_devices(self) -> int | None:
        """Return how many devices torch sees; None if it cannot say."""
        return int(self.module.device_count())

    def _check_index(self, index: int | None, count: int | None) -> None:
        """Raise `BackendError` unless device `index` is one of `count`; None: that is unknown."""
        if count == 0:
            raise DeviceUnavailable(self.name, "torch sees 0 devices", self.device_hint())
        if index is not None and count is not None and not 0 <= index < count:
            names = " or ".join(self.visibility)
            why = f" ({names} selects the visible ones)" if names else ""
            raise BackendError(
                f"backend '{self.name}' has no device {index}: it has {count}, numbered from 0{why}."
            )

    def _start(self, index: int | None) -> torch.device:
        """Make the device current and use it once: a broken driver fails here and not in the first op."""
        import torch

        if index is not None:
            self._make_current(index)
        device = torch.zeros(1, device=self.device_type).device
        self.synchronize()
        if index is not None and (device.index or 0) != index:
            reason = f"after torch.{self.device_type}.set_device({index}), tensors are made on {device}"
            raise DeviceUnavailable(self.name, reason, self.device_hint())
        return device

    def _make_current(self, index: int) -> None:
        if hasattr(self.module, "set_device"):
            self.module.set_device(index)
        elif index:
            reason = f"torch.{self.device_type} has no set_device(), so device {index} cannot be made current"
            raise DeviceUnavailable(self.name, reason, "use device 0, or hide the others")

    def prepare_device(self) -> None:
        """Do what a vendor's stack needs once, right after the device has started."""

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
        properties = self.properties()
        if not (hasattr(properties, "major") and hasattr(properties, "minor")):
            return None
        return f"{properties.major}.{properties.minor}"

    def multiprocessors(self) -> int | None:
        """Return the number of multiprocessors; None if the stack does not report it."""
        return known(self.properties(), "multi_processor_count")

    def floats_since(self, capability: tuple[int, int]) -> tuple[torch.dtype, ...]:
        """Return float16, float32 and, from this capability on, bfloat16: what is older emulates it."""
        import torch

        properties = self.properties()
        native = (properties.major, properties.minor) >= capability
        return (*((torch.bfloat16,) if native else ()), torch.float16, torch.float32)

    def device_info(self) -> DeviceInfo:
        properties = self.properties()
        return DeviceInfo(
            name=self.device_type if properties is None else str(properties.name),
            memory_bytes=known(properties, "total_memory"),
            cache_bytes=known(properties, "L2_cache_size"),
        )

    def memory(self) -> MemoryInfo:
        both = ask(self.module, "mem_get_info", self.device)
        if both is None:  # of the current device, where the function takes none
            both = ask(self.module, "mem_get_info")
        free, total = both if isinstance(both, tuple) and len(both) == 2 else (None, None)
        return MemoryInfo(
            free=whole(free),
            total=whole(total),
            allocated=whole(ask(self.module, "memory_allocated")),
            peak=whole(ask(self.module, "max_memory_allocated")),
        )

    def empty_cache(self) -> None:
        ask(self.module, "empty_cache")

    # ------------------------------------------------------------------------------------ environment

    @functools.cached_property
    def monitor(self) -> Monitor | None:
        """The vendor's management library, or None; subclasses override it for one without NVML's names."""
        return None if self.dialect is None else Monitor(self.sampler(self.dialect, self.address))

    def address(self) -> Address:
        """Return where the device is; a monitor asks in a thread whose current device is the first."""
        index = self.device.index or 0 if self.device else 0
        visible = next(iter(set_variables(self.visibility).values()), None)
        return Address(index, visible, str(getattr(self.properties(), "uuid", None) or ""))

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
                "device": lambda: self.device,
                "device_count": self.visible_devices,
                "capability": self.capability,
                "multiprocessors": self.multiprocessors,
                "graphs": lambda: self.graphs,
                "host_threads": lambda: self._host_threads,
                "variables": lambda: set_variables((*self.visibility, *self.variables)),
                "vendor": self.vendor_facts,
                "float32": float32_facts,
                "sensors": self._sensor_facts,
            }
        )

    def _sensor_facts(self) -> Mapping[str, str]:
        """Return the monitor's facts, its readings at setup and its readings now."""
        readings = {"at_setup": self.at_setup, "now": self.sensors()}
        facts = {} if self.monitor is None else self.monitor.facts()
        for when, reading in readings.items():
            facts |= {f"{when}.{name}": value for name, value in reading.items()}
        return facts


# -------------------------------------------------------------------------------------- environment
# The environment report of a `TorchBackend`: what a number on that device depended on.
def report(parts: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
    """Return the facts of all parts: several, one under the part's name, or None.

    Never raises: a part that fails becomes one fact, under its own name.
    """
    facts: dict[str, str] = {}
    for name, part in parts.items():
        try:
            value = part()
            facts |= value if isinstance(value, Mapping) else {} if value is None else {name: str(value)}
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything
            facts[name] = f"unknown ({describe(error)})"
    return facts


def set_variables(names: Sequence[str]) -> dict[str, str]:
    """Return those of the environment variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def known(properties: Any, name: str) -> int | None:
    """Return a number from the properties of a device; absent and zero mean unknown."""
    value = getattr(properties, name, None)
    return int(value) if value else None


def versions(modules: Sequence[str], distributions: Sequence[str]) -> dict[str, str]:
    """Return the versions of modules, which are imported, and of the distributions that are installed."""
    known = {name: str(getattr(importlib.import_module(name), "__version__", "?")) for name in modules}
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return known


# -------------------------------------------------------------------------------- asking the module
# Asking a device's torch module what not every vendor's has, or has an answer to.
@contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect the texts of warnings instead of printing them."""
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield remarks
    remarks += [str(warning.message).partition("\n")[0].strip() for warning in caught]


def attempt(function: Callable[..., Any] | None, *arguments: Any) -> Any:
    """Call an optional function of a stack; None if it is missing, raises or does not know."""
    try:
        return None if function is None else function(*arguments)
    except Exception:  # noqa: BLE001  # vendor stacks raise anything
        return None


def ask(module: ModuleType, name: str, *arguments: Any) -> Any:
    """Call an optional function of the device module; None if it does not exist or does not know."""
    return attempt(getattr(module, name, None), *arguments)


def whole(value: Any) -> int | None:
    """Return `value` if it is a count, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def working_dtypes(
    device: torch.device, synchronize: Callable[[], Any]
) -> tuple[tuple[torch.dtype, ...], dict[str, str]]:
    """Return the dtypes in which a product is exactly right, and by name why the others are left out.

    The factors are small integers, so that the product [16, 16] has no rounding in any floating dtype.
    """
    import torch

    factor, left_out = (torch.arange(256) * 5 % 7 - 3).view(16, 16), {}
    right, works = (factor @ factor).float(), []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        try:
            there = factor.to(dtype).to(device)
            product = there @ there
            synchronize()
            result = product.cpu().float()
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything
            left_out[name] = describe(error)
            continue
        wrong = (result != right).flatten().nonzero()
        if len(wrong):
            seen, true = (numbers.flatten()[wrong[0]].item() for numbers in (result, right))
            left_out[name] = f"a sum of 16 products came out as {seen:g}, and is {true:g}"
        else:
            works.append(dtype)
    return tuple(works), left_out


# ------------------------------------------------------------------------------------------- graphs
# Capturing a function into a device graph, the same way for every stack shaped like torch.cuda.

WARMUPS = 3  # calls before the capture: lazy initialisation and growing workspaces must not be captured


def capture(module: ModuleType, graph_class: str, fn: Callable[[], None]) -> Callable[[], None]:
    """Run `fn` a few times on a side stream, capture one more call, and return its replay.

    A replay repeats the captured kernels on the same addresses; host code of `fn` does not run again.
    Raises whatever the stack does when `fn` cannot be captured, for example because it waits for the device.
    """
    side = module.Stream()
    side.wait_stream(module.current_stream())
    with module.stream(side):
        for _ in range(WARMUPS):
            fn()
    module.current_stream().wait_stream(side)
    graph = getattr(module, graph_class)()
    with module.graph(graph):
        fn()
    replay: Callable[[], None] = graph.replay
    return replay


def capturing(device: torch.device) -> bool:
    """Return whether the device's current stream is being captured into a graph."""
    import torch

    probe = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return bool(probe is not None and probe())


# ------------------------------------------------------------------------------------------- timing
# Timing on the device's own clock, through events of its torch module.

# Cycles that the device is kept busy before the first event: 50 us at 2 GHz, longer than a host takes to
# launch an op from Python, or a graph.
LEAD_CYCLES = 100_000


class EventTimer:
    """Time between two events in the current stream: what the device spent, launch gaps included.

    The device is kept busy before the first event, where its module has a `_sleep`: on an idle stream the
    event would take place at once, and the time the host takes to launch the first op would count. Launches
    of those first 50 us or so do not count; later ones do, if the device waits for them. This is not a
    headline number (`Backend.timer`).
    """

    def __init__(self, module: ModuleType, device_type: str, synchronize: Callable[[], None]) -> None:
        self.clock = f"{device_type} events"
        self._synchronize = synchronize
        self._first, self._last = (module.Event(enable_timing=True) for _ in range(2))
        self._keep_busy = _lead(module)

    def start(self) -> None:
        self._synchronize()
        self._keep_busy(LEAD_CYCLES)
        self._first.record()

    def stop(self) -> float:
        """Return the milliseconds since `start`, all submitted work included."""
        self._last.record()
        self._synchronize()
        return float(self._first.elapsed_time(self._last))


def _lead(module: ModuleType) -> Callable[[int], None]:
    """Return what keeps the device busy for some cycles; nothing does where the stack has no such kernel."""
    sleep: Callable[[int], None] | None = getattr(module, "_sleep", None)
    try:
        if sleep is not None:
            sleep(1)
            module.synchronize()
            return sleep
    except Exception:  # noqa: BLE001  # vendor stacks raise anything; without it a launch counts, no more
        pass
    return lambda cycles: None


# ------------------------------------------------------------------------------------------ float32
# Products of float32 are made in float32: TF32, whose mantissa has 10 bits, is turned off and recorded.
#
# A container may turn it on, and some stacks do so by default (torch_musa 2.7.1, Context.h).

# Turn TF32 on or off for torch's products, or off for all of a vendor's libraries.
TF32_VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")
SWITCH = "allow_tf32"


def forbid_tf32() -> None:
    """Turn TF32 off for torch's products, and for each library of `torch.backends` that has a switch."""
    import torch

    with _quietly():
        torch.set_float32_matmul_precision("highest")
    for library in _libraries().values():
        with _quietly(), contextlib.suppress(Exception):  # what is not turned off is in the facts
            library.allow_tf32 = False


def float32_facts() -> dict[str, str]:
    """Return the precision of torch's products, and library -> whether it may use TF32."""
    import torch

    facts = {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    for name, library in _libraries().items():
        try:
            with _quietly():
                value = library.allow_tf32
        except Exception as error:  # noqa: BLE001  # torch refuses to read a mixture of both settings
            value = f"unreadable ({describe(error)})"
        if value is not None:
            facts[f"{name}.{SWITCH}"] = str(value)
    return facts


def _libraries() -> dict[str, Any]:
    """Return the members of `torch.backends` with a switch. Looked up only: to read a switch may raise."""
    import torch

    return {
        name: member
        for name, member in vars(torch.backends).items()
        # A module does not list what its class has.
        if not name.startswith("_") and SWITCH in {*dir(member), *dir(type(member))}
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Some releases announce a successor of a setting that others lack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
