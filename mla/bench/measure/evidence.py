"""Evidence against a number whose outputs are right: what speaks against the time, and forwards that tell.

A backend is trusted code, and may be wrong: its `synchronize` may return early, its device's clock may count
something else, and its kernels may keep results of earlier calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from statistics import fmean, median
from time import perf_counter_ns as now_ns
from typing import TYPE_CHECKING, Any

from mla_backends.api import Timer

if TYPE_CHECKING:
    from mla.bench.measure.passes import PassRunner, PassTimes
    from mla.bench.measure.variants import Steps

# A device's clock is believed that agrees with the host's within this ratio, and so many milliseconds a
# forward, in one of TURNS windows of at least so many milliseconds.
WITHIN, EACH, WINDOW, TURNS = 0.10, 0.02, 20.0, 5
# The most forwards of a window.
MOST = 4096
# A forward ends late if a copy to the host waits for so many milliseconds more once its clock has stopped,
# beyond WITHIN of its time. So may this share of the forwards, and these few, on a busy machine.
LATE, SHARE, FEW = 0.05, 0.1, 2
# Forwards on new inputs: of a decode, or timed ones of passes that time only some. They may take so many
# times as long as in the passes, and so many milliseconds longer.
STEPS, SOME, SLOWER, LEAST = 8, 3, 1.5, 0.05
# Rounds of them: others only make forwards slower, so the fastest of all counts.
ROUNDS = 12

_random = random.SystemRandom()


class Unseen:
    """Inputs of a layer that none of its forwards has seen, with an oracle of their own.

    Both are made once, and serve all variants and implementations of a scenario. They are replaced once they
    have contradicted a time: who remembers them is known from then on.
    """

    def __init__(self, plain: Any, checker: Any, count: int) -> None:
        """`plain`: the inputs of the passes; `count`: forwards that are judged at most.

        Draws the first inputs and runs the oracle, which may take minutes.
        """
        self.plain, self._checker, self._count = plain, checker, count
        self._inputs: Any = None
        self._judge: Any = None
        self.judge()

    @property
    def inputs(self) -> Any:
        """The inputs, drawn when they are asked for."""
        if self._inputs is None:
            self._inputs = self.plain.fresh(_random.getrandbits(63))
        return self._inputs

    def forget(self) -> None:
        """Have others drawn."""
        self._judge = self._inputs = None

    def judge(self) -> Any:
        """Return the checker of a pass on these inputs."""
        if self._judge is None:
            self._judge = self._checker.of(self.inputs, self._count)
        return self._judge


def forwards(steps: Steps, prefill: bool) -> int:
    """Return how many forwards of a pass are run on inputs that nothing has seen."""
    most = 1 if prefill else STEPS if len(steps.timed) == len(steps.run) else SOME
    return steps.timed[min(len(steps.timed), most) - 1] + 1


def doubts(
    runner: PassRunner, new: Unseen | None, numbers: Iterator[int], beat: Callable[[], None]
) -> Iterator[str]:
    """Yield why the times of one variant cannot be right, a clause each.

    Forwards are run, whose passes take `numbers`; `beat` is called after each.
    """
    found = late_doubt(runner.passes), device_doubt(runner, numbers, beat)
    yield from filter(None, found)
    if new is not None and (told := fresh_doubt(runner, new, numbers, beat)):
        yield told


def late_doubt(passes: Sequence[PassTimes]) -> str:
    """Return why forwards were not done when their clock stopped, or nothing."""
    pairs = [pair for one in passes for pair in zip(one.late, one.inside, strict=True)]
    late = [(rest, ms) for rest, ms in pairs if rest > WITHIN * ms + LATE]
    if len(late) <= max(FEW, SHARE * len(pairs)):
        return ""
    rest, ms = (median(values) for values in zip(*late, strict=True))
    return (
        f"the device worked on for {rest:.3g} ms after {len(late)} of {len(pairs)} timed forwards of "
        f"{ms:.3g} ms, as if `synchronize` returned early"
    )


def device_doubt(runner: PassRunner, numbers: Iterator[int], beat: Callable[[], None]) -> str:
    """Return why the device's clock cannot be right, or nothing; passes take `numbers`."""
    timer = runner.timer
    if timer is None:
        return ""
    each = median(ms for one in runner.passes for ms in one.inside)
    count = min(MOST, max(3, ceil(WINDOW / max(each, 1e-3))))
    for _ in range(TURNS):
        beat()
        device, host = _window(runner, timer, count, numbers)
        if abs(device - host) <= WITHIN * host + EACH * count:
            runner.confirmed = True
            return ""
    return (
        f"{count} forwards take {device:.3g} ms by the clock '{timer.clock}', but {host:.3g} ms by the host's"
    )


def _window(runner: PassRunner, timer: Timer, count: int, numbers: Iterator[int]) -> tuple[float, float]:
    """Return the milliseconds of several forwards at once, on the device's clock and on the host's.

    On the host's clock they end when a copy has waited for their outputs. If those are not there even then,
    as where a backend queues what torch does not know of, they end when the timer says so.
    """
    forwards, indices = runner.forwards, runner.steps.run
    forwards.restore(next(numbers))
    runner.wait()
    timer.start()
    start = now_ns()
    for place in range(count):
        if place and place % len(indices) == 0:
            forwards.restore(next(numbers))
        index = indices[place % len(indices)]
        forwards.before(index)
        forwards.step(index)
    runner.wait()
    done = now_ns()
    out = getattr(forwards, "out", None)
    is_there = out is not None and not bool(out.reshape(-1)[-1:].isnan().any())
    taken = timer.stop()
    return taken, ((done if is_there else now_ns()) - start) / 1e6


def fresh_doubt(runner: PassRunner, new: Unseen, numbers: Iterator[int], beat: Callable[[], None]) -> str:
    """Return how forwards on inputs that nothing has seen contradict the passes of a layer, or nothing.

    Hidden states and history are new: nothing can have been remembered for them. Slow ones speak against the
    passes only where the same forwards on the inputs of the passes, run in turn with them, are not slow.
    """
    layer, scenario = runner.implementation, new.plain.scenario
    prefill = scenario.mode == "prefill"
    count = forwards(runner.steps, prefill)
    known = _known(runner, len(runner.steps.run) if prefill else count)
    found, again = list[float](), list[float]()
    while True:
        runner.rewarm(next(numbers))
        layer.load(scenario, new.inputs)
        found.append(median(runner.run(0, beat, count).samples))
        quick = not _slower(found[-1], known)
        check = layer.check(new.judge()) if quick else None
        layer.load(scenario, new.plain)
        if check is not None:
            break
        again.append(median(runner.run(next(numbers), beat, count).samples))
        new.forget()
        if len(found) < ROUNDS:
            continue
        if _slower(min(found), min(again)):
            return (
                f"forwards on fresh inputs take {min(found):.3g} ms, those of the passes {known:.3g} ms, as "
                "if results were remembered"
            )
        layer.load(scenario, new.inputs)
        runner.run(0, beat, count)
        check = layer.check(new.judge())
        layer.load(scenario, new.plain)
        break
    if check.reason:
        new.forget()
    return f"outputs on fresh inputs are wrong: {check.reason}" if check.reason else ""


def _slower(new: float, known: float) -> bool:
    return new > SLOWER * known and new - known > LEAST


def _known(runner: PassRunner, count: int) -> float:
    """Return the milliseconds that the first `count` forwards of the passes took.

    The median is the latency, and throughput follows from the average: neither may be too low.
    """
    pairs = [pair for one in runner.samples.passes for pair in zip(runner.steps.timed, one, strict=True)]
    taken = [ms for index, ms in pairs if index < count]
    return min(median(taken), fmean(taken))
