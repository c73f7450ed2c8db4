"""`Launcher`: starts Triton kernels, with a smaller tile where the device lacks the resources for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mla_backends.errors import describe, one_line
from mla_backends.kernels.vendor import KernelRefused
from mla_backends.triton_ops.tuning import Tile

Grid = tuple[int, ...]


class Launcher:
    """Starts kernels. `launches` counts them; `remarks` says which tiles did not fit."""

    def __init__(self) -> None:
        self.launches = 0
        self.remarks: list[str] = []
        self._fitting: dict[tuple[str, Tile], Tile] = {}  # kernel and tile -> the smaller one that runs

    def start(
        self, kernel: Any, grid: Grid, arguments: Mapping[str, Any], *, warps: int = 4, stages: int = 1
    ) -> None:
        """Start `kernel` (made by `triton.jit`) on `grid`; `arguments` by name, constants included."""
        self.launches += 1
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)

    def start_tiled(self, name: str, tile: Tile, start: Callable[[Tile], None]) -> None:
        """Call `start` with `tile`, or with a smaller one where the device lacks the resources for it.

        What did not fit is not tried again. Raises `KernelRefused` if no tile fits.
        """
        chosen = self._fitting.get((name, tile))
        if chosen is not None:
            start(chosen)
            return
        why = ""
        for candidate in (tile, *tile.smaller()):
            try:
                start(candidate)
            except Exception as error:
                if not lacks_resources(error):
                    raise
                why = why or one_line(describe(error))
            else:
                self._keep(name, tile, candidate, why)
                return
        raise KernelRefused(f"{name} does not fit this device in any tile ({why}).")

    def _keep(self, name: str, tile: Tile, fitting: Tile, why: str) -> None:
        self._fitting[name, tile] = fitting
        if why:
            self.remarks.append(f"{name} runs with {fitting}, as {tile} does not fit this device ({why})")


def lacks_resources(error: Exception) -> bool:
    """Return whether Triton raised this before launching, because a kernel needs too much of the device."""
    return type(error).__name__ == "OutOfResources"
