"""All evidence against the times of one variant of one implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, Protocol

from mla.bench.doubts import backend_clocks, beside, fresh_inputs
from mla.bench.doubts.clock import now_ns
from mla.bench.doubts.device_wait import DeviceWait
from mla.bench.doubts.pass_times import PassTimes
from mla.bench.subjects.base import Implementation
from mla_backends.api import Backend, Timer

# Further pairs of an idle pass and another one, at least and at most, before the time beside forwards is
# doubted; and the nanoseconds after which no more than the fewest are run.
FEWEST, MORE, PATIENCE = 4, 60, 4_000_000_000


class Timed(Protocol):
    """A variant whose passes were timed (`mla.bench.measure.passes.PassRunner`)."""

    implementation: Implementation
    forwards: Any
    samples: Any
    steps: Any
    timer: Timer | None
    passes: list[PassTimes]
    idles: list[PassTimes]

    @property
    def headline(self) -> bool: ...

    def time_step(self, index: int) -> float: ...

    def pair(self, number: int, untimed: Iterator[int], heartbeat: Callable[[], None]) -> PassTimes: ...


def has_own_ops(one: Timed) -> bool:
    """Return whether any op of the backend is timed here: a slow wait is its own loss then."""
    return any(name != "reference" for name in one.implementation.ops().values())


def doubts(
    one: Timed,
    backend: Backend,
    checker: Any,
    numbers: Iterator[int],
    beat: Callable[[], None],
    own_waits: list[float],
) -> list[str]:
    """Return why times cannot be right, a clause each. Forwards are run, whose passes take `numbers`.

    `own_waits` are the milliseconds that waiting adds to forwards with ops of the backend, which come first:
    the first one's wait is its own loss, and the measure of all others.
    """
    count = len(one.passes)
    found = [_beside(one, numbers, beat), *at_hand(one, checker, strictly=False)]
    forwards, indices = one.forwards, _several(one)

    def restore() -> None:
        beat()
        forwards.restore(next(numbers))

    wait = DeviceWait(one.implementation.setting.device)
    if one.timer is not None:
        region = region_doubt(one)
        if region and not backend_clocks.only_polls(one.passes, forwards, indices, restore, wait):
            found.append(region)
        found.append(backend_clocks.device_doubt(one.timer, forwards, indices, restore, wait))
    elif one.headline:
        found.append(backend_clocks.timer_doubt(backend, forwards, len(one.steps.run), restore))
        own, synchronize = has_own_ops(one), backend.synchronize
        allowed = max(beside.median_region(one.idles), min(own_waits, default=0.0))
        waited = backend_clocks.wait_doubt(forwards, indices, restore, synchronize, wait, allowed)
        doubt, done, added = waited
        timed = median(ms for times in one.passes[:count] for ms in times.inside)
        found.append(doubt if own_waits or not own else "")
        own_waits += [min(added, max(0.0, timed - done))] * own  # what only evidence sees excuses nobody
        found.append(fresh_inputs.doubt(one, checker, beat))
    return [doubt for doubt in found if doubt]


def _beside(one: Timed, numbers: Iterator[int], beat: Callable[[], None]) -> str:
    """Return why work may have run beside the clock; more passes run where a busy machine could be why."""
    on_host = _on_host(one)
    if not beside.suspicion(one.passes, one.idles, on_host):
        return ""
    count, timed = len(one.passes), median(times.regions for times in one.passes)
    end, found = now_ns() + PATIENCE, ""
    for number in range(MORE):
        one.pair(next(numbers), numbers, beat)
        if number + 1 >= FEWEST:
            more = one.passes[count:]
            found = beside.lasting(more, one.idles, timed, on_host)
            settled = not found and not all(times.disturbed for times in more)
            if settled or now_ns() > end:
                break
    return found


def _on_host(one: Timed) -> bool:
    return one.implementation.setting.device.type == "cpu"


def at_hand(one: Timed, checker: Any, strictly: bool = True) -> list[str]:
    """Return what speaks against times without running anything.

    With `strictly`, work beside the clock counts as well, where no disturbance can be why.
    """
    found = [
        beside.doubt(one.passes, one.idles, _on_host(one), quiet=0, disturbed=100) if strictly else "",
        beside.empty_doubt(one.passes, one.idles),
        one.implementation.doubt(checker, one.samples.check),
    ]
    return [doubt for doubt in found if doubt]


def region_doubt(one: Timed) -> str:
    """Return why a device's clock cannot be right unless it polls, which only more forwards tell."""
    return "" if one.timer is None else backend_clocks.region_doubt(one.passes, one.idles)


def _several(one: Timed) -> Sequence[int]:
    """Return the indices of a few forwards; those of a prefill, or of one op, may be the same one."""
    scenario = getattr(one.implementation, "scenario", None)
    if scenario is not None and scenario.mode == "decode":
        return one.steps.run[: backend_clocks.LONG]
    return [0] * backend_clocks.LONG
