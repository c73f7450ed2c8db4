"""Forwards on inputs that nothing has seen, for which nothing can have been remembered.

The inputs of timed passes come again: a request has a sign and a few choices, and checks, warm-ups and other
variants have shown most of them before. These here are drawn from the system's entropy, all rows new. They
must be as fast as the timed ones, and right.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Protocol

import torch

from mla.bench.doubts.clock import Disturbance, cpu_ns, now_ns
from mla.bench.doubts.pass_times import PassTimes
from mla.bench.results.stats import percentile
from mla.bench.subjects.base import Implementation, TakesInputs

# How many times as long as in the passes a forward may take, and how many milliseconds more say nothing.
WITHIN, LEAST = 1.5, 0.05
# Forwards of a round: of one prefill each, and steps of a decode.
PREFILLS, STEPS = 3, 8
# Milliseconds of a prefill from which one will do in a round: a disturbance is short beside it.
LONG = 1000.0
# The percentile of a round's forwards that counts: work that is new is new in all of them.
QUIET = 25
# A busy machine disturbs most rounds: one that is fast enough and right is believed, and forwards speak
# against the passes only where others did not keep them from running. Rounds, least and most, and the
# nanoseconds after which no more than the fewest are run.
FEWEST, ROUNDS, PATIENCE = 3, 60, 6_000_000_000
# Seconds of rest before each round after the fewest, more every time, up to a limit: where others want the
# CPUs, a process that has rested is let in.
REST, LONGEST_REST = 0.01, 0.2

# Bound before any plugin loads.
_random, _sleep = random.SystemRandom(), time.sleep


class Timed(Protocol):
    """A variant whose passes were timed (`mla.bench.measure.passes.PassRunner`)."""

    implementation: Implementation
    forwards: Any
    samples: Any
    steps: Any
    passes: list[PassTimes]

    def time_step(self, index: int) -> float: ...


@dataclass(frozen=True)
class _Times:
    """Milliseconds of a forward, and of the process's CPUs in it; whether others had the CPUs."""

    wall: float
    cpu: float
    disturbed: bool = False

    def slower(self, known: _Times, on_host: bool) -> bool:
        """Return whether these times are far longer; on the host, CPU time must say the same."""
        if self.wall <= WITHIN * known.wall or self.wall - known.wall <= LEAST:
            return False
        return not on_host or self.cpu > WITHIN * known.cpu


def doubt(one: Timed, checker: Any, beat: Callable[[], None] = lambda: None) -> str:
    """Return how forwards on new inputs contradict the passes of a layer, or nothing.

    One prefill is judged, which costs as much as the scenario's oracle: the fastest, whose time counts. All
    steps of a decode are.
    """
    layer = one.implementation
    if not isinstance(layer, TakesInputs):
        return ""
    decode, on_host = layer.scenario.mode == "decode", layer.setting.device.type == "cpu"
    count = min(len(one.steps.run), STEPS if decode else PREFILLS)
    known = _known(one, count if decode else len(one.steps.run))
    count = 1 if not decode and known.wall > LONG else count
    end, slow = now_ns() + PATIENCE, list[_Times]()
    for number in range(ROUNDS):
        _sleep(min(LONGEST_REST, REST * max(0, number - FEWEST + 1)))
        hidden, times = _run(one, layer, count, beat)
        judged = sorted(times) if decode else [min(times, key=lambda index: times[index].wall)]
        fast = not _quiet([times[index] for index in judged]).slower(known, on_host)
        slow += [times[index] for index in judged if not times[index].disturbed]
        if fast or (number + 1 >= FEWEST and now_ns() > end):
            break
    if not fast and len(slow) >= FEWEST and (fresh := _quiet(slow)).slower(known, on_host):
        return (
            f"forwards on inputs that nothing had seen take {fresh.wall:.3g} ms, on those of the passes "
            f"{known.wall:.3g} ms, as if results were remembered"
        )
    layer.keep_collected(judged)
    return _wrong(layer, checker, torch.stack(hidden if decode else [hidden[judged[0]]]))


def _quiet(several: Sequence[_Times]) -> _Times:
    walls, cpus = ([getattr(one, name) for one in several] for name in ("wall", "cpu"))
    return _Times(percentile(walls, QUIET), percentile(cpus, QUIET))


def _known(one: Timed, count: int) -> _Times:
    """Return what the first `count` forwards of the passes took.

    The median is the latency, and throughput follows from the average: neither may be too low.
    """
    walls = [
        ms
        for samples in one.samples.passes
        for index, ms in zip(one.steps.timed, samples, strict=True)
        if index < count
    ]
    cpus = [times.regions_cpu / times.forwards for times in one.passes]
    return _Times(*(min(median(times), fmean(times)) for times in (walls, cpus)))


def _run(
    one: Timed, layer: TakesInputs, count: int, beat: Callable[[], None]
) -> tuple[list[torch.Tensor], dict[int, _Times]]:
    """Run a pass on new inputs. Return these, and the times of the forwards that were collected."""
    times = []
    with layer.fed(_random.getrandbits(63), count) as hidden:
        one.forwards.restore(0)
        for index in range(count):
            one.forwards.before(index)
            disturbance, start = Disturbance(), cpu_ns()
            wall = one.time_step(index)
            times.append(_Times(wall, (cpu_ns() - start) / 1e6, disturbance.spoils(wall)))
            one.forwards.after(index)
            beat()
        layer.collect()
        walls = layer.slowest([each.wall for each in times])
    slowest = [replace(each, wall=wall) for each, wall in zip(times, walls, strict=True)]
    return hidden, {index: slowest[index] for index in layer.compared()}


def _wrong(layer: TakesInputs, checker: Any, hidden: torch.Tensor) -> str:
    check = layer.check(checker.of(hidden))
    if check.status == "ok":
        return ""
    return f"outputs on inputs that nothing had seen are wrong: {check.reason}"
