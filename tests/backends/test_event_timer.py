"""The device's clock on a model of a stream, where the host queues work that the device does in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mla_backends.torch_backend import LEAD_CYCLES, EventTimer

LEAD = LEAD_CYCLES / 2e3  # us at 2 GHz


class Stream:
    """Microseconds on host and device: work starts once it is queued and what precedes it is done."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def run(self, launch: float, kernel: float) -> None:
        self.host += launch
        self.device = max(self.device, self.host) + kernel

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)


def module_of(stream: Stream, **more: Any) -> Any:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            stream.run(launch=0.5, kernel=0)
            self.at = stream.device

        def elapsed_time(self, other: Any) -> float:
            return (other.at - self.at) / 1e3

    return SimpleNamespace(Event=Event, synchronize=stream.synchronize, **more)


def timed(stream: Stream, module: Any, *ops: tuple[float, float]) -> float:
    """Return the microseconds that the timer gives for ops of (launch, kernel) microseconds."""
    timer = EventTimer(module, "acme", stream.synchronize)
    times = []
    for _ in range(3):
        stream.host += 1000  # the device is idle
        timer.start()
        for launch, kernel in ops:
            stream.run(launch, kernel)
        times.append(1e3 * timer.stop())
    assert times == pytest.approx([times[0]] * 3)
    return times[0]


def sleeping(stream: Stream) -> dict[str, Any]:
    return {"_sleep": lambda cycles: stream.run(launch=5, kernel=cycles / 2e3)}


def test_the_launch_of_a_graph_does_not_count() -> None:
    stream = Stream()
    assert timed(stream, module_of(stream, **sleeping(stream)), (30, 100)) == pytest.approx(100)


def test_gaps_between_later_ops_count() -> None:
    """The host needs 200 us to launch what takes the device 80 us."""
    stream = Stream()
    gap = timed(stream, module_of(stream, **sleeping(stream)), *[(20.0, 8.0)] * 10)
    assert gap == pytest.approx(200 + 0.5 - LEAD + 8)


def broken(cycles: int) -> None:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("more", [{}, {"_sleep": broken}, {"_sleep": None}], ids=["none", "broken", "unset"])
def test_a_stack_that_cannot_keep_its_device_busy_counts_the_first_launch(more: dict[str, Any]) -> None:
    stream = Stream()
    assert timed(stream, module_of(stream, **more), (30, 100)) == pytest.approx(130)
