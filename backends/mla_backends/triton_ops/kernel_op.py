"""What the Triton ops share: what they need to run, and a trial before the first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mla_backends.api import FusedOp
from mla_backends.kernels.trial import failures
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.requirements import absent, missing

if TYPE_CHECKING:
    import torch

DeviceReason = Callable[["torch.device"], str]  # why a device cannot run the kernels; "" if it can
CURE = "use the Triton that this torch asks for, or other ops (`-O triton=off` offers none of these)"


class KernelOp(FusedOp):
    """Base of the ops. Its kernels are compiled at the first use, which `preflight` is."""

    compiles = "Triton kernels, unless they are in Triton's cache"
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    tiled = ""  # what the launcher calls the kernel that has a tile

    def __init__(self, launcher: Launcher, device_reason: DeviceReason | None = None) -> None:
        self.launcher = launcher
        self._device_reason = device_reason

    @property
    def remarks(self) -> list[str]:  # type: ignore[override]
        """Say which of its tiles did not fit the device."""
        return [one for one in self.launcher.remarks if self.tiled and one.startswith(self.tiled)]

    def unsupported_reasons(self, spec: Any) -> list[str]:
        """Return that there is no Triton, and what the kernel is not made for."""
        why = self._device_reason(spec.device) if self._device_reason is not None else ""
        name = str(spec.dtype).removeprefix("torch.")
        computes = [] if name in self.dtypes else [f"it computes in {' or '.join(self.dtypes)}, not {name}"]
        return ([why] if why else []) + computes + self.shape_reasons(spec) + absent()

    def shape_reasons(self, spec: Any) -> list[str]:
        """Return why the kernel is not made for these sizes (empty if it is)."""
        return []

    def preflight(self, spec: Any) -> list[str]:
        """Run tiny problems, which compiles the kernels; where that fails, say first what Triton lacks."""
        found = failures(lambda: self.attempt(spec), "the Triton kernel", CURE)
        return (missing() or found) if found else []

    def attempt(self, spec: Any) -> str:
        """Run a tiny problem; return what is wrong, "" if nothing."""
        raise NotImplementedError

    def start(self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], warps: int) -> None:
        """Start a kernel that has no tile."""
        self.launcher.start(kernel, grid, arguments, warps=warps)


def wide(size: int, least: int = 1) -> int:
    """Return the next power of two, at least `least`; 0 for 0."""
    return max(least, 1 << (size - 1).bit_length()) if size else 0
