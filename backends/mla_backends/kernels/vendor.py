"""Vendor packages, imported when a layer is built; a missing or broken one is a reason, not an error."""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, FusedOp
from mla_backends.errors import BackendError, describe, one_line
from mla_backends.selftest import failures, try_expanded, try_latent
from mla_backends.torch_backend import capturing as capturing

if TYPE_CHECKING:
    import torch


OTHER_OPS = "use other ops (`--ops reference`)"


class KernelRefused(BackendError):
    """A vendor kernel cannot serve this cache or call; raised on the host, before anything is launched."""

    state = "unsupported"


class VendorModule:
    """A module of a vendor's package, and the functions that an adapter calls, with the keywords it passes.

    Nothing is imported until `reasons` or an attribute is asked for. `hint` says how to install it.
    """

    def __init__(self, name: str, needs: Mapping[str, Iterable[str]], hint: str = "") -> None:
        self.name, self.hint = name, hint
        self._needs = needs

    @functools.cached_property
    def _loaded(self) -> tuple[ModuleType | None, str]:
        """Return the module, or None and why there is none."""
        try:
            return importlib.import_module(self.name), ""
        except Exception as error:  # noqa: BLE001  # a broken extension module raises anything
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent and f"{self.name}.".startswith(f"{absent}."):
                return None, self.with_hint(f"{absent} is not installed")
            return None, f"{self.name} is installed but cannot be imported ({one_line(describe(error))})"

    def with_hint(self, text: str) -> str:
        """Return a clause with how to install the package behind it."""
        return f"{text} ({self.hint})" if self.hint else text

    def reasons(self) -> list[str]:
        """Return why the module cannot be used (empty if it can)."""
        module, reason = self._loaded
        if module is None:
            return [reason]
        return [f"{self.name} has no {name}" for name in self._needs if not hasattr(module, name)]

    def differences(self, needs: Mapping[str, Iterable[str]] | None = None) -> list[str]:
        """Return which keywords its functions, or others and "Class.method", do not take (empty if all)."""
        return [
            self.with_hint(reason)
            for name, arguments in (self._needs if needs is None else needs).items()
            for reason in missing(operator.attrgetter(name)(self), f"{self.name}.{name}", arguments)
        ]

    def __getattr__(self, name: str) -> Any:
        """Return a function or class of the module. Raises `KernelRefused` if there is no module."""
        if name.startswith("_"):
            raise AttributeError(name)
        module, reason = self._loaded
        if module is None:
            raise KernelRefused(f"{reason}.")
        return getattr(module, name)


@functools.lru_cache(maxsize=256)  # they are asked for in every step
def parameters(function: Callable[..., Any]) -> Mapping[str, Any] | None:
    """Return the arguments that can be passed by keyword, and defaults; None if any can, or if unknown."""
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter.default for parameter in known if parameter.kind in by_name}


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether `function` is known to have an argument called `name`."""
    return name in (parameters(function) or ())


def missing(function: Callable[..., Any], label: str, names: Iterable[str]) -> list[str]:
    """Return a reason per name that `function`, called `label`, does not take by keyword."""
    known = parameters(function)
    return [f"{label} takes no argument {name}" for name in names if known is not None and name not in known]


class VendorOp(FusedOp):
    """Base of adapters: what a vendor's package lacks, what its kernel is not made for, and a first trial.

    A subclass names its module and what it `needs` of that: functions, and for each the keywords that it
    passes -> the name of what it gives them, or a constant that is no text. `limits` have `reasons(spec)`,
    why the kernel cannot serve a layer.
    """

    lse_optional = True
    module: str
    needs: Mapping[str, Mapping[str, Any]]
    limits: Any
    tried = False  # before the first use: it may not work on a device that it is made for
    cure = ""  # of a kernel that cannot be compiled or loaded; with one, it is tried
    label = ""  # of what is tried; else it is the module

    def __init__(
        self, limits: Any = None, *, module: str = "", install: str = "", compiles: str = "", cure: str = ""
    ) -> None:
        """Take the kernel's limits on a vendor's devices, and how to get the module.

        `module` is another one with the same functions, `compiles` what it compiles at first use, and `cure`
        what to do where that fails.
        """
        self._vendor = VendorModule(module or self.module, self.needs, install)
        self.limits = limits or self.limits
        self.compiles = compiles or self.compiles
        self.cure = cure or self.cure or (install or OTHER_OPS if self.tried else "")
        self._scratch = Scratch()

    def _call(self, name: str, record: object, more: Mapping[str, Any], **options: Any) -> Any:
        """Call a function with what it needs, fields of a record or `more`, and with `options`."""
        given = {**vars(record), **more}
        passed = {
            keyword: given[ours] if isinstance(ours, str) else ours
            for keyword, ours in self.needs[name].items()
        }
        return getattr(self._vendor, name)(**{**passed, **options})

    def unsupported_reasons(self, spec: Any) -> list[str]:
        vendor = self._vendor
        reasons = vendor.reasons() or self.interface_reasons() or vendor.differences()
        return reasons + self.layer_reasons(spec)

    def interface_reasons(self) -> list[str]:
        """Return why a package that is installed does not serve, besides keywords that it does not take."""
        return []

    def layer_reasons(self, spec: Any) -> list[str]:
        """Return why the kernel cannot serve layers like `spec` (empty if it can)."""
        reasons: list[str] = self.limits.reasons(spec)
        return reasons

    def preflight(self, spec: Any) -> list[str]:
        """Return why the kernel does not work on this device, after a tiny problem."""
        label = self.label or self._vendor.name
        return failures(lambda: self.attempt(spec), label, self.cure) if self.cure else []

    def attempt(self, spec: Any) -> str:
        """Compute a tiny problem; return what is wrong, "" if nothing.

        Over pages it is computed as the layer calls it first, and with the log-sum-exp: either may compile.
        """
        if self.contract == OPS["expanded_attention"]:
            return try_expanded(self, spec)
        page = (self.limits.page_sizes or (64,))[-1]
        return try_latent(self, spec, page, with_lse=False) or try_latent(self, spec, page)


# ------------------------------------------------------------------------------------------ scratch
class Scratch:
    """Named buffers per trailing shape, dtype and device, zero where they were never written."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], torch.Tensor] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        like: torch.Tensor,
        fresh: bool = False,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return memory of this shape, by default in the dtype of `like`; contents stay, row for row.

        `fresh` returns separate memory, full of zeros: what a graph captures must outlive a later growth.
        """
        import torch

        key = (name, shape[1:], dtype or like.dtype, like.device)
        held = None if fresh else self._held.get(key)
        if held is None or held.shape[0] < shape[0]:
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                held = like.new_zeros(shape, dtype=dtype)
            if not fresh:
                self._held[key] = held
        return held[: shape[0]]


def padded(scratch: Scratch, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return v [Tk, h, v] with zeros after its own columns, as wide as k [Tk, h, d]."""
    wide = scratch.take(f"v{v.shape[2]}", tuple(k.shape), v, fresh=capturing(v.device))
    wide[..., : v.shape[2]].copy_(v)
    return wide


def is_aligned(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of 16-bit numbers and its rows start at multiples of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1])


MULTIPROCESSORS = 256  # where the device does not say; more than any has


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has, or more."""
    import torch

    function = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    properties = None if function is None or device.type == "cpu" else function(device)
    return int(getattr(properties, "multi_processor_count", None) or MULTIPROCESSORS)


# ------------------------------------------------------------------------------------------ reasons
DeviceReason = Callable[["torch.device"], str]  # why a device cannot run a kernel; "" if it can


def layer_reasons(device_reason: DeviceReason | None, dtypes: Sequence[str], spec: Any) -> list[str]:
    """Return why a kernel cannot run on a layer's device, or in its dtype (empty if it can)."""
    why, name = device_reason(spec.device) if device_reason else "", str(spec.dtype).removeprefix("torch.")
    reasons = [why] if why else []
    return reasons if name in dtypes else [*reasons, f"it computes in {either(dtypes)}, not {name}"]


def either(values: Iterable[object]) -> str:
    """Join values as "1, 2 or 3"."""
    words = list(dict.fromkeys(map(str, values)))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
