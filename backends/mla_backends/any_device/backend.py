"""`AnyDevice`: the reference ops on whatever device torch knows, so that a new card gets a checked number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends.any_device import facts, trials
from mla_backends.any_device.find import Found, Unusable, find, parse
from mla_backends.api import Availability, DeviceInfo, MemoryInfo, Timer
from mla_backends.cuda import OUTDATED_DRIVER
from mla_backends.errors import BackendError, BackendOptionError, DeviceUnavailable, describe
from mla_backends.known import GENERAL
from mla_backends.torch_backend import TorchBackend
from mla_backends.torch_backend.float32 import TF32_VARIABLES, float32_facts, forbid_tf32

if TYPE_CHECKING:
    import torch


class AnyDevice(TorchBackend):
    """The device that `-O device=NAME` names, else the accelerator that torch reports.

    `-O import=MODULE` names the package that brings it, unless it is `torch_NAME` or loaded by torch.
    There are no fused ops, and graphs only with `-O graph=on`.
    """

    name = GENERAL
    api_version = 1
    variables = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTORCH_ENABLE_MPS_FALLBACK", *TF32_VARIABLES)

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        wanted = self.options.get("device")
        self._wanted, self._index = ("", None) if wanted is None else parse(wanted)
        self.device_type = self._wanted
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
    def found(self) -> Found:
        """The device's module. Raises `Unusable`, and whatever importing torch raises."""
        found = find(self._wanted, self.options.get("import", ""))
        self.device_type = found.device_type
        self.graph_class = trials.graph_class(found.module, found.device_type)
        self.requires = (found.extension,) if found.extension else ()
        return found

    @property
    def module(self) -> ModuleType:  # cached in `found`
        """Return the device's torch module."""
        return self.found.module

    def probe(self) -> Availability:
        try:
            found = self.found
        except Unusable as why:
            return Availability(False, why.reason, why.hint)
        except Exception as error:  # noqa: BLE001  # a torch that does not import raises anything
            absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
            reason = "torch is not installed" if absent else f"importing torch raised {describe(error)}"
            return Availability(False, reason, self.install_hint)
        evidence = {"device": f"{found.device_type}, {found.how}"}
        if found.extension:
            evidence["extension"] = found.extension
        if not hasattr(found.module, "is_available"):
            return Availability(True, evidence={**evidence, "is_available": "missing; setup will tell"})
        answer = self.probe_module(found.module, evidence)
        return replace(answer, hint=self._cure(answer.reason) or answer.hint)

    def device_count(self) -> int | None:  # type: ignore[override]
        """Return None where `-O device` names an index: tasks are then not spread over the devices."""
        return facts.count(self.module) if self._index is None else None

    # ------------------------------------------------------------------------------------------ setup

    def setup(self, index: int | None = None) -> torch.device:
        """Start the device. A driver that is too old may pass the probe, and fails here."""
        try:
            return super().setup(index)
        except DeviceUnavailable as error:
            hint = self._cure(error.reason)
            if not hint:
                raise
            raise DeviceUnavailable(self.name, error.reason, hint) from error

    def _cure(self, reason: str) -> str:
        """Return what to do if `reason` is that the driver is too old for this torch; "" if it is not."""
        import torch

        if not OUTDATED_DRIVER.search(reason):
            return ""
        return (
            f"update the driver, or install a torch older than {torch.__version__} that the driver supports"
        )

    def _check_index(self, index: int | None) -> None:
        if None not in (index, self._index) and index != self._index:
            raise BackendOptionError(
                f"-O device={self.options['device']} and --device {index} name different devices."
            )
        count, index = facts.count(self.module), self._index if index is None else index
        if count == 0:
            raise DeviceUnavailable(self.name, "torch sees 0 devices", self.device_hint())
        if index is not None and count is not None and index >= count:
            there = f"{count} {self.device_type} device{'' if count == 1 else 's'}"
            raise BackendError(f"backend '{self.name}' has {there}, so there is no device {index}.")

    def _start(self, index: int | None) -> torch.device:
        """Make the device current and use it once."""
        import torch

        index = self._index if index is None else index
        if index and not hasattr(self.module, "set_device"):
            reason = f"torch.{self.device_type} has no set_device(), so device {index} cannot be made current"
            raise DeviceUnavailable(self.name, reason, "use device 0, or hide the others")
        if index is not None and hasattr(self.module, "set_device"):
            self.module.set_device(index)
        device = torch.zeros(1, device=self.device_type).device
        self.synchronize()
        if index is not None and (device.index or 0) != index:
            reason = f"after torch.{self.device_type}.set_device({index}), tensors are made on {device}"
            raise DeviceUnavailable(self.name, reason, self.device_hint())
        return device

    def prepare_device(self) -> None:
        """Try what the device can do, with products of float32 in float32."""
        forbid_tf32()
        if self.options.get("graph") == "on" and not self.graph_class:
            module = f"torch.{self.device_type}"
            absent = ", ".join(trials.lacking(self.module, self.device_type))
            raise BackendOptionError(
                f"-O graph=on: {module} lacks what a capture needs ({absent}): leave the option out."
            )
        device = self._device()
        works, self._left_out = trials.working_dtypes(device, self.synchronize)
        if not works:
            problems = "; ".join(f"{name}: {why}" for name, why in self._left_out.items())
            hint = "update torch and the package that brings the device"
            raise DeviceUnavailable(self.name, f"no product comes out right on it ({problems})", hint)
        self._dtypes = tuple(works)
        self._clock_problem = trials.clock_problem(self.module, self.device_type, self.synchronize)

    def synchronize(self) -> None:
        self.found.synchronize()

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes in which a product works. Which of them are native, torch does not say."""
        return self._dtypes

    def device_timer(self) -> Timer | None:
        return None if self._clock_problem else super().device_timer()

    # ------------------------------------------------------------------------------------------ facts

    def _device(self) -> torch.device:
        assert self.device is not None  # set up
        return self.device

    def device_info(self) -> DeviceInfo:
        return facts.info(self.module, self._device())

    def memory(self) -> MemoryInfo:
        return facts.memory(self.module, self._device())

    def empty_cache(self) -> None:
        facts.attempt(getattr(self.module, "empty_cache", None))

    def remarks(self) -> Sequence[str]:
        """Name a device that was not chosen, and the backend of this project that is made for it."""
        said = [] if self._wanted else [f"device {self._device()}: {self.found.how} (-O device= chooses)"]
        own = facts.own_backend(self.device_type)
        if own:
            said.append(
                f"backend '{own}' is made for this device and has ops of its own: {facts.how_to_use(own)}"
            )
        return said

    def device_hint(self) -> str:
        """Return what to check: most often, that torch is the wrong build."""
        import torch

        build = f"that this torch ({torch.__version__}) is built for {self.device_type}"
        return f"check {build}, that the driver lists the device and that this container was given it"

    def vendor_facts(self) -> Mapping[str, str]:
        tried = ", ".join(str(dtype).removeprefix("torch.") for dtype in self._dtypes)
        return {
            "device_type": self.device_type,
            "device_from": self.found.how,
            "ops": "reference only",
            "dtypes": f"{tried} (tried; which of them are native is unknown)",
            **{f"dtypes.{name}": f"left out: {why}" for name, why in self._left_out.items()},
            "device_clock": f"none: {self._clock_problem}" if self._clock_problem else "events",
            **float32_facts(),
            **facts.extensions(),
        }

    def _device_facts(self) -> Mapping[str, str]:
        asked: dict[str, Callable[[], Any]] = {
            "device": self._device,
            "device_count": lambda: facts.count(self.module),
            "capability": self.capability,
            "multiprocessors": self.multiprocessors,
            "graphs": lambda: self.graphs,
            "host_threads": lambda: self._host_threads,
        }
        answers = {name: facts.attempt(function) for name, function in asked.items()}
        return {name: str(value) for name, value in answers.items() if value is not None}
