"""Making an emulated device known to torch: as `PrivateUse1` under a name, or in the place of `cuda`."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from emulated.state import STATE
from emulated.tensor import EmulatedTensor, pin, run

# Positions in c10's enumeration of device types.
CUDA, PRIVATEUSE1, DEVICE_TYPES = 1, 20, 22
_alive: list[Any] = []  # what torch only borrows


def as_privateuse1(name: str, module: ModuleType) -> None:
    """Rename PrivateUse1 and give it kernels, as a vendor's package does."""

    class Guard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    guard = Guard()
    backend_registration._setup_privateuseone_for_python_backend(
        name, backend_module=module, device_guard=guard
    )
    sys.modules[f"torch.{name}"] = module
    kernels, autocast = torch.library.Library("_", "IMPL"), torch.library.Library("_", "IMPL")
    kernels.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _alive.extend((guard, kernels, autocast))
    _emulate()


def as_cuda(module: ModuleType) -> None:
    """Stand in for `torch.cuda`, whether or not this torch was built with CUDA."""
    _alive.append(_guard_for_cuda())
    for name, value in vars(module).items():
        if not name.startswith("__"):
            setattr(torch.cuda, name, value)
    _emulate()


def _guard_for_cuda() -> Any:
    """Register a guard written in Python, and let c10 find it under CUDA: `.to("cuda")` needs one."""

    class Guard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.CUDA

    guard = Guard()
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    c10 = ctypes.CDLL(str(Path(str(torch.__file__)).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * DEVICE_TYPES).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    table[CUDA] = table[PRIVATEUSE1]
    return guard


def _emulate() -> None:
    """Let factories of the device make emulated tensors, for the rest of the process."""
    mode = _Emulate()
    mode.__enter__()
    _alive.append(mode)
    _make_constructors_copy()


class _Emulate(TorchDispatchMode):
    """Sees factories and copies to the device, which have no emulated tensor among their arguments yet.

    And every operation of the host, of which there are ten times as many: they are let through at once.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and torch's guard against it takes longer than what it guards."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if EmulatedTensor in types:
            return run(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == STATE.name:
            return run(func, args, kwargs)
        if kwargs.get("pin_memory") and STATE.pins:
            return pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)


def _make_constructors_copy() -> None:
    """Build `torch.tensor(..., device=)` from a host tensor: torch's own way skips Python kernels."""
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def through_host(make: Any, data: Any, dtype: Any, device: Any, **rest: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != STATE.name:
            return make(data, dtype=dtype, device=device, **rest)
        return make(data, dtype=dtype, device="cpu", **rest).to(device)

    torch.tensor = lambda data, *, dtype=None, device=None, **rest: through_host(
        tensor, data, dtype, device, **rest
    )
    torch.as_tensor = lambda data, dtype=None, device=None: (
        data.to(device=device or data.device, dtype=dtype or data.dtype)
        if isinstance(data, torch.Tensor)
        else through_host(as_tensor, data, dtype, device)
    )
