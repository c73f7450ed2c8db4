"""What a device can do, found out by trying: nothing about it is known beforehand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends.errors import describe

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
SIDE = 16
SLEEP_MS = 20.0
# A pause of SLEEP_MS measured with events: clocks drift, and another unit is off by a factor of 1000.
LEAST, SLACK = 0.8, 1.2


def working_dtypes(
    device: torch.device, synchronize: Callable[[], Any]
) -> tuple[list[torch.dtype], dict[str, str]]:
    """Return the dtypes in which a product comes out right, and why the others are left out, by name."""
    import torch

    works, left_out = [], {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        try:
            ones = torch.ones(SIDE, SIDE).to(dtype).to(device)
            product = ones @ ones
            synchronize()
            found = product.cpu().float()
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything
            left_out[name] = describe(error)
            continue
        if bool((found == SIDE).all()):
            works.append(dtype)
        else:
            left_out[name] = f"a sum of {SIDE} ones came out as {found.flatten()[0].item():g}"
    return works, left_out


def clock_problem(module: ModuleType, device_type: str, synchronize: Callable[[], Any]) -> str:
    """Time a pause with two events; return why they are no clock, or "" if they are one."""
    if not hasattr(module, "Event"):
        return f"torch.{device_type} has no Event"
    try:
        passed, found = _timed_pause(module, synchronize)
    except Exception as error:  # noqa: BLE001  # several stacks have an Event that cannot time
        return f"torch.{device_type}.Event cannot time: {describe(error)}"
    if math.isfinite(found) and LEAST * SLEEP_MS <= found <= SLACK * passed + 1:
        return ""
    return f"torch.{device_type}.Event called a pause of {passed:.1f} ms {found:.3g} ms"


def _timed_pause(module: ModuleType, synchronize: Callable[[], Any]) -> tuple[float, float]:
    """Return the milliseconds of a pause on the host's clock and on the events'."""
    first, last = (module.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    first.record()
    synchronize()  # so that a lazy queue, too, reaches the first event before the pause
    time.sleep(SLEEP_MS / 1e3)
    last.record()
    synchronize()
    passed = 1e3 * (time.perf_counter() - start)
    return passed, float(first.elapsed_time(last))


def graph_class(module: ModuleType, device_type: str) -> str:
    """Return the name of the module's graph class if everything that a capture needs is there, else ""."""
    return "" if lacking(module, device_type) else f"{device_type.upper()}Graph"


def lacking(module: ModuleType, device_type: str) -> list[str]:
    """Return what the module lacks of what a capture needs."""
    needed = (f"{device_type.upper()}Graph", "graph", "Stream", "stream", "current_stream")
    return [name for name in needed if not hasattr(module, name)]
