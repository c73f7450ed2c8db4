"""Finding the torch module of a device by the device's name, or the sentence that says why there is none."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mla_backends.errors import BackendOptionError, describe, plugin_code

# Names under which people know a device -> torch's name of its module. A ROCm build calls it cuda.
ALIASES = {"hip": "cuda", "rocm": "cuda"}
CHOOSE = "choose a device with -O device=NAME"
_DEVICE = re.compile(r"([a-z][a-z0-9_]*)(?::(\d{1,4}))?")


class Unusable(Exception):
    """There is no such device, or it cannot be measured: `reason` and `hint`, one clause each."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(f"{reason}; {hint}")
        self.reason, self.hint = reason, hint


@dataclass(frozen=True)
class Found:
    """A device's torch module, and how this process came by it."""

    device_type: str
    module: ModuleType
    synchronize: Callable[[], Any]
    how: str  # "named by -O device", or that torch reports it
    extension: str = ""  # the package that brings the module, if it is imported


def parse(text: str) -> tuple[str, int | None]:
    """Split "xpu:1" into type and index. Raises `BackendOptionError`."""
    match = _DEVICE.fullmatch(text.strip().lower())
    if match is None:
        raise BackendOptionError(
            f"backend 'torch' takes -O device=NAME or NAME:INDEX, such as xpu or xpu:1, got '{text}'."
        )
    return match[1], None if match[2] is None else int(match[2])


def find(name: str, extension: str = "") -> Found:
    """Return the device called `name`, or the accelerator that torch reports if that is empty.

    `extension` is imported first. Raises `Unusable`, and whatever importing torch raises.
    """
    torch = importlib.import_module("torch")
    if extension:
        _import(extension, f"-O import={extension} names it")
    how = f"named by -O device={name}" if name else "the accelerator that torch reports"
    device_type = _torch_name(torch, name) if name else _reported(torch)
    module = _module(torch, device_type) or _brought(torch, device_type, extension)
    wait = _synchronize(torch, device_type, module)
    bringer = extension or f"torch_{device_type}"
    return Found(device_type, module, wait, how, bringer if bringer in sys.modules else "")


def _torch_name(torch: ModuleType, name: str) -> str:
    """Return what torch calls the device. Raises `Unusable` for one that no layer can run on."""
    if name == "meta":
        reason = "a meta tensor has a shape and no numbers, so nothing could be checked"
        raise Unusable(reason, _choices(torch))
    if name in ALIASES and not getattr(torch.version, "hip", None):
        reason = f"this torch is not a ROCm build (torch.version.hip is None), so it has no {name} device"
        raise Unusable(reason, f"install torch's build for ROCm, or {_choices(torch)}")
    return ALIASES.get(name, name)


def _module(torch: ModuleType, device_type: str) -> Any:
    """Return `torch.<device_type>` if that is a device's module (`torch.nn` is not), else None."""
    try:
        torch.device(device_type)
    except Exception:  # noqa: BLE001  # RuntimeError as of today
        return None
    return getattr(torch, device_type, None)


def _brought(torch: ModuleType, device_type: str, asked: str) -> Any:
    """Import the package that brings a device to torch, whose name custom gives, and look again."""
    bringer = f"torch_{device_type}"
    reason = f"torch {torch.__version__} has no torch.{device_type}"
    hint = (
        f"install the package that brings it; if that is not called {bringer}, name it with "
        f"-O import=MODULE; or {_choices(torch)}"
    )
    if asked:
        raise Unusable(
            f"{reason}, and importing {asked} does not bring it",
            f"name the module that registers it with -O import=MODULE, or {_choices(torch)}",
        )
    _import(bringer, hint, reason)
    module = _module(torch, device_type)
    if module is None:
        raise Unusable(f"{reason}, and importing {bringer} does not bring it", hint)
    return module


def _import(package: str, hint: str, otherwise: str = "") -> None:
    """Import `package`. Raises `Unusable`."""
    prefix = f"{otherwise}, and " if otherwise else ""
    try:
        with plugin_code():
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise Unusable(f"{prefix}importing {package} raised {describe(error)}", hint) from error
        raise Unusable(f"{prefix}{package} is not installed", hint) from error
    except Exception as error:
        raise Unusable(f"{prefix}importing {package} raised {describe(error)}", hint) from error


def _synchronize(torch: ModuleType, device_type: str, module: ModuleType) -> Callable[[], Any]:
    """Return what waits for the device. Raises `Unusable`: without it, a clock would time launches."""
    own = getattr(module, "synchronize", None)
    if callable(own):
        return own
    accelerator = getattr(torch, "accelerator", None)
    if hasattr(accelerator, "synchronize") and current_accelerator(torch) == device_type:
        return accelerator.synchronize  # type: ignore[union-attr]
    raise Unusable(
        f"torch.{device_type} has no synchronize(), so a clock would stop before the work is done",
        "update the package that brings the device",
    )


def current_accelerator(torch: ModuleType) -> str:
    """Return the type of torch's current accelerator; "" where torch is too old to say, or has none."""
    try:
        found = torch.accelerator.current_accelerator()
    except Exception:  # noqa: BLE001  # missing before torch 2.6; asks the device's module, which may lack it
        return ""
    return "" if found is None else str(found.type)


def _reported(torch: ModuleType) -> str:
    """Return the one accelerator that is here. Raises `Unusable`: nothing is guessed."""
    here = [name for name in device_modules(torch) if name != "cpu" and _is_here(torch, name)]
    current = current_accelerator(torch)
    if current in here:
        return current
    if len(here) == 1:
        return here[0]
    seen = f"several accelerators ({', '.join(here)})" if here else "no accelerator"
    raise Unusable(f"torch {torch.__version__} reports {seen}", _choices(torch))


def device_modules(torch: ModuleType) -> list[str]:
    """Return the device types for which this torch has a module, whether or not there is a device."""
    modules = [name for name, value in vars(torch).items() if isinstance(value, ModuleType)]
    return sorted(name for name in modules if not name.startswith("_") and _module(torch, name))


def _is_here(torch: ModuleType, device_type: str) -> bool:
    module = getattr(torch, device_type)
    try:
        return bool(module.is_available() if hasattr(module, "is_available") else module.device_count())
    except Exception:  # noqa: BLE001  # vendor stacks raise anything
        return False


def _choices(torch: ModuleType) -> str:
    """Return how to name a device, and which ones there are."""
    modules = device_modules(torch)
    here = [name for name in modules if _is_here(torch, name)]
    others = ", ".join(name for name in modules if name not in here)
    known = f"; this torch also knows {others}" if others else ""
    return f"{CHOOSE} (available here: {', '.join(here) or 'none'}{known})"
