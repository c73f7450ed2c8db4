"""`Launcher`: starts Triton kernels, with a smaller tile where the device lacks the resources for one."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

from mla_backends.errors import describe, one_line
from mla_backends.kernels.vendor import KernelRefused
from mla_backends.triton_ops.tuning import Tile

if TYPE_CHECKING:
    import torch

Grid = tuple[int, ...]

# What Triton and vendors' forks raise, by name, for a kernel that needs too much; and what assemblers and
# drivers say of one.
OUT_OF_RESOURCES = "OutOfResources"
SAID = re.compile(
    r"too many resources|out of resources?|too much shared|exceed\w* .*(shared|local) memory|\(LDS\)"
    r"|register allocation failed",
    re.IGNORECASE,
)


class Launcher:
    """Starts kernels. `launches` counts them; `remarks` says which tiles did not fit."""

    def __init__(self) -> None:
        self.launches = 0
        self.remarks: list[str] = []
        self._fitting: dict[Hashable, Tile] = {}  # kernel, tile and variant -> the tile that runs

    def start(
        self, kernel: Any, grid: Grid, arguments: Mapping[str, Any], *, warps: int = 4, stages: int = 1
    ) -> None:
        """Start `kernel` (made by `triton.jit`) on `grid`; `arguments` by name, constants included."""
        written = arguments.get("out", arguments.get("cache"))
        with on_device(written.device):  # Triton starts kernels on the current device
            kernel[grid](**arguments, num_warps=warps, num_stages=stages)
        self.launches += 1

    def start_tiled(self, name: str, tile: Tile, variant: Hashable, start: Callable[[Tile], None]) -> None:
        """Call `start` with `tile`, or with a smaller one where the device lacks the resources for it.

        `variant` is what else the kernel is compiled for, and says so as text: what fits one need not fit
        another. What did not fit is not tried again. Raises `KernelRefused` if no tile fits.
        """
        key = (name, tile, variant)
        begin, why = self._fitting.get(key, tile), ""
        for candidate in chain((begin,), begin.smaller()):  # which is seldom asked for a second
            try:
                start(candidate)
            except Exception as error:
                if not lacks_resources(error):
                    raise
                why = why or one_line(describe(error))
            else:
                self._fitting[key] = candidate
                if why:
                    what = f"{name} ({variant})"
                    self._remark(f"{what} runs with {candidate}, as {begin} does not fit this device ({why})")
                return
        raise KernelRefused(f"{name} does not fit this device in any tile ({why}).")

    def _remark(self, sentence: str) -> None:
        if sentence not in self.remarks:
            self.remarks.append(sentence)


def lacks_resources(error: Exception) -> bool:
    """Return whether a kernel was not started because it needs too much of the device."""
    name = type(error).__name__
    if name == OUT_OF_RESOURCES:
        return True
    return name in ("RuntimeError", "PTXASError") and SAID.search(str(error)) is not None


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one of its kind, for a while, unless it is."""
    import torch

    module = getattr(torch, device.type, None)
    current = getattr(module, "current_device", None)
    if device.index is None or device.type == "cpu" or current is None or current() == device.index:
        return nullcontext()
    guard: AbstractContextManager[Any] = module.device(device.index)  # type: ignore[union-attr]
    return guard
