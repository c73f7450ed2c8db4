"""What the ops launch, recorded without a device: kernels with the arguments that they would have got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mla_backends.triton_ops.launcher import Grid, Launcher, registers


@dataclass(frozen=True)
class Launch:
    kernel: Any  # made by `triton.jit`
    grid: Grid
    arguments: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None  # the most of a thread; None is the compiler's choice


class Recorder(Launcher):
    """Keeps what it is told to start, and starts nothing: outputs hold whatever they held."""

    def __init__(self, early: bool = False, native_e4m3: bool = False, bounds: bool = False) -> None:
        super().__init__(early, native_e4m3, bounds)
        self.recorded: list[Launch] = []

    def start(
        self,
        kernel: Any,
        grid: Grid,
        arguments: Mapping[str, Any],
        *,
        warps: int = 4,
        stages: int = 1,
        programs: int = 1,
    ) -> None:
        self.launches += 1
        most = registers(warps, programs) if self.bounds else None
        self.recorded.append(Launch(kernel, grid, dict(arguments), warps, stages, most))
