"""All evidence against the times of one variant of one implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mla.bench.doubts import backend_clocks, beside, fresh_inputs
from mla.bench.doubts.pass_times import PassTimes
from mla.bench.subjects.base import Implementation
from mla_backends.api import Backend, Timer


class Timed(Protocol):
    """A variant whose passes were timed (`mla.bench.measure.passes.PassRunner`)."""

    implementation: Implementation
    forwards: Any
    samples: Any
    steps: Any
    timer: Timer | None
    passes: list[PassTimes]
    idles: list[PassTimes]

    def time_step(self, index: int) -> float:
        """Run a step and return its milliseconds on the runner's clock."""
        ...


def doubts(
    one: Timed,
    backend: Backend,
    checker: Any,
    numbers: Iterator[int],
    beat: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return why times cannot be right, a clause each; `beat` is called between forwards.

    Some forwards are run; their passes take `numbers`.
    """
    forwards, steps = one.forwards, len(one.steps.run)

    def restore() -> None:
        forwards.restore(next(numbers))

    on_host = one.implementation.setting.device.type == "cpu"
    found = [
        beside.doubt(one.passes, one.idles, on_host),
        beside.empty_doubt(one.passes, one.idles),
        one.implementation.doubt(checker, one.samples.check),
    ]
    if one.timer is not None:
        found.append(backend_clocks.device_doubt(one.timer, forwards, steps, restore))
    else:
        found.append(backend_clocks.timer_doubt(backend, forwards, steps, restore))
    variant = one.samples.variant
    if (variant.mode, variant.cache, variant.clock) == ("eager", "warm", "host"):
        found.append(fresh_inputs.doubt(one, checker, beat))
    return [doubt for doubt in found if doubt]
