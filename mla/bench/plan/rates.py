"""What a device reaches, roughly, in a fraction of a second: for estimates of time and nothing else.

The limits that results are compared with take seconds to measure, which a short budget does not have.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla.bench.subjects.setting import Setting

# A probe grows until it takes this many seconds, so that launches do not dominate it.
ENOUGH = 5e-3
SIDES = (256, 512, 1024, 2048, 4096)
FOOTPRINTS = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)
# Calls of torch in a forward, with what Python does between them, and the least they take.
CALLS, OVERHEAD = 100, 5e-4
# Seconds after which a call is not tried again, and how often it is tried.
TRIED, MOST_CALLS = 0.03, 8


@dataclass(frozen=True)
class Rates:
    """Of the device: FLOP per second, bytes per second and the seconds of an empty forward; of the host:
    float64 FLOP per second, for the oracle.
    """

    flops: float
    bandwidth: float
    float64: float
    overhead: float = OVERHEAD
    by_torch: float = math.inf  # FLOP per second of its products in the run's own dtype


def measure_rates(setting: Setting) -> Rates:
    """Return the rates of a device. Raises whatever its stack raises."""
    device, wait = setting.device, setting.backend.synchronize
    small = torch.ones(8, 8, device=device)
    own = _products(setting.dtype, device, wait)
    return Rates(
        flops=max(own, _products(torch.float32, device, wait)),
        by_torch=own,
        bandwidth=_reading(device, wait),
        float64=_products(torch.float64, torch.device("cpu"), lambda: None, SIDES[:2]),
        overhead=max(OVERHEAD, CALLS * _seconds(lambda: small.add_(1), wait)),
    )


def _products(
    dtype: torch.dtype, device: torch.device, wait: Callable[[], None], sides: tuple[int, ...] = SIDES
) -> float:
    rate = 0.0
    for side in sides:
        x = torch.ones(side, side, dtype=dtype, device=device)
        taken = _seconds(lambda x=x: torch.mm(x, x.t()), wait)  # type: ignore[misc]  # as weights are laid out
        rate = max(rate, 2 * side**3 / taken)
        if taken > ENOUGH:
            break
    return rate


def _reading(device: torch.device, wait: Callable[[], None]) -> float:
    """Return the rate of the largest footprint that was read: smaller ones may lie in a cache."""
    rate = 0.0
    for count in FOOTPRINTS:
        x = torch.ones(count // 4, device=device)
        taken = _seconds(x.sum, wait)
        rate = count / taken
        if taken > ENOUGH:
            break
    return rate


def _seconds(call: Callable[[], object], wait: Callable[[], None]) -> float:
    """Return the shortest of some calls after a first one, which may compile.

    There are at least two, and more where time is left: others may have kept the CPUs busy.
    """
    best, begin = float("inf"), time.perf_counter()
    for number in itertools.count():
        passed = time.perf_counter() - begin
        if number >= MOST_CALLS or (number > 2 and passed > TRIED):
            break
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken = time.perf_counter() - start
        if number:
            best = min(best, taken)
    return max(best, 1e-9)
