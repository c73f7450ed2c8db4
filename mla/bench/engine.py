"""Time implementations against each other, fairly, and check what was timed.

Per scenario: every implementation runs one whole pass, which is compared with the oracle; those that are
wrong are not timed. Then passes alternate in seeded random order. A pass starts from the restored history.
At the end the outputs left by the last timed pass are compared with the oracle again.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from mla.bench.check import Checker
from mla.bench.implementations import Implementation
from mla.bench.inputs import Inputs
from mla.bench.results import Check
from mla.bench.transient import TransientBytes
from mla.bench.workload import Scenario
from mla.errors import MLAError
from mla_backends.api import Timer

Progress = Callable[[str, int], None]  # what is running, forwards done since the last call


class ClockError(MLAError):
    """A timer that cannot have measured anything."""

    exit_code = 3


@dataclass
class Measured:
    """What one implementation's passes gave. Only complete passes are in `passes`."""

    check: Check
    passes: list[list[float]] = field(default_factory=list)  # milliseconds
    after_switch: list[bool] = field(default_factory=list)  # per pass: another implementation ran before
    interrupted: bool = False
    transient_bytes: int | None = None


def measure(
    implementations: Sequence[Implementation],
    scenario: Scenario,
    inputs: Inputs,
    checker: Checker,
    timer: Timer,
    seed: int,
    progress: Progress = lambda what, done: None,
) -> dict[str, Measured]:
    """Return name -> measurement. An interrupt ends timing early and keeps the complete passes."""
    measured: dict[str, Measured] = {}
    try:
        for one in implementations:
            one.load(scenario, inputs)
            measured[one.name] = _run_and_check(one, scenario, checker, progress)
        right = [one for one in implementations if measured[one.name].check.status == "ok"]
        for one in right:
            _warm_up(one, scenario, progress)
        with _no_garbage_collection():
            _time_passes(right, scenario, timer, random.Random(seed), measured, progress)
        for one in implementations:
            _check_again(one, measured[one.name], checker)
    except KeyboardInterrupt:
        for one in implementations:
            fallback = Measured(Check(status="not run", reason="interrupted"))
            found = measured.setdefault(one.name, fallback)
            found.interrupted = True
            if found.check.status == "ok":
                found.check.reason = "interrupted: checked before timing only"
    return measured


def _run_and_check(one: Implementation, scenario: Scenario, checker: Checker, progress: Progress) -> Measured:
    """Run a whole pass, untimed; the last forward, whose lengths are the largest, has its memory counted."""
    transient = TransientBytes()
    for index in range(scenario.inputs):
        one.before(index)
        with transient if index == scenario.inputs - 1 else nullcontext():
            one.step(index)
        progress(f"{scenario.name}: checking {one.name}", 1)
    check = one.check(checker)
    return Measured(check, transient_bytes=transient.peak + one.scratch_bytes())


def _warm_up(one: Implementation, scenario: Scenario, progress: Progress) -> None:
    one.restore()
    for index in range(scenario.untimed):
        one.before(index)
        one.step(index)
        progress(f"{scenario.name}: warming up {one.name}", 1)


def _time_passes(
    implementations: Sequence[Implementation],
    scenario: Scenario,
    timer: Timer,
    order: random.Random,
    measured: dict[str, Measured],
    progress: Progress,
) -> None:
    previous = ""
    turns = list(implementations)
    for _ in range(scenario.turns):
        order.shuffle(turns)
        for one in turns:
            one.restore()
            one.outputs.fill_(float("nan"))  # so that the check after timing sees this pass alone
            samples = _time_pass(one, scenario, timer)
            measured[one.name].passes.append(samples)
            measured[one.name].after_switch.append(one.name != previous)
            previous = one.name
            progress(f"{scenario.name}: timing {one.name}", len(samples))


def _time_pass(one: Implementation, scenario: Scenario, timer: Timer) -> list[float]:
    samples = []
    for index in range(scenario.steps):
        one.before(index)
        timer.start()
        one.step(index)
        samples.append(timer.stop())
    if not (math.isfinite(sum(samples)) and statistics.median(samples) > 0):
        raise ClockError(f"the {timer.clock} clock of this backend measured {samples[0]} ms for a forward.")
    return samples


def _check_again(one: Implementation, result: Measured, checker: Checker) -> None:
    """Check the outputs of the last timed pass; a case that is wrong now loses its numbers."""
    if result.check.status != "ok":
        return
    again = one.check(checker)
    if again.status != "ok":
        again.reason = f"right before timing and wrong after it: {again.reason}"
        result.passes.clear()
    elif (again.error_ratio or 0) < (result.check.error_ratio or 0):
        return
    result.check = again


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the timed region."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
