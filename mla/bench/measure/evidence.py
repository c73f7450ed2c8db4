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
ROUNDS = 6

_random = random.SystemRandom()


def doubts(
    runner: PassRunner, inputs: Any, checker: Any, numbers: Iterator[int], beat: Callable[[], None]
) -> list[str]:
    """Return why the times of one variant cannot be right, a clause each.

    Forwards are run, whose passes take `numbers`; `beat` is called after each.
    """
    found = (
        late_doubt(runner.passes),
        device_doubt(runner, numbers, beat),
        fresh_doubt(runner, inputs, checker, numbers, beat),
    )
    return [doubt for doubt in found if doubt]


def late_doubt(passes: Sequence[PassTimes]) -> str:
    """Return why forwards were not done when their clock stopped, or nothing."""
    pairs = [pair for one in passes for pair in zip(one.late, one.inside, strict=True)]
    late = [(rest, ms) for rest, ms in pairs if rest > WITHIN * ms + LATE]
    if len(late) <= max(FEW, SHARE * len(pairs)):
        return ""
    rest, ms = (median(values) for values in zip(*late, strict=True))
    return (
        f"in {len(late)} of {len(pairs)} timed forwards the device worked for another {rest:.3g} ms after "
        f"their {ms:.3g} ms, as if `synchronize` returned early"
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
            return ""
    return (
        f"{count} forwards take {device:.3g} ms on the clock '{timer.clock}' and {host:.3g} ms on the host's"
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


def fresh_doubt(
    runner: PassRunner, inputs: Any, checker: Any, numbers: Iterator[int], beat: Callable[[], None]
) -> str:
    """Return how forwards on inputs that nothing has seen contradict the passes of a layer, or nothing.

    Hidden states and history are new: nothing can have been remembered for them. Slow ones speak against the
    passes only where the same forwards on the inputs of the passes, run in turn with them, are not slow.
    """
    layer, timed = runner.implementation, runner.steps.timed
    if not hasattr(checker, "of"):  # of one op, whose operands change from call to call
        return ""
    decode = inputs.scenario.mode == "decode"
    some = min(len(timed), STEPS if len(timed) == len(runner.steps.run) else SOME) if decode else 1
    count = timed[some - 1] + 1
    known = _known(runner, count if decode else len(runner.steps.run))
    found, again = list[float](), list[float]()
    for _ in range(ROUNDS):
        fresh = inputs.fresh(_random.getrandbits(63))
        runner.rewarm(next(numbers))
        layer.load(inputs.scenario, fresh)
        found.append(median(runner.run(0, beat, count).samples))
        check = layer.check(checker.of(fresh, count)) if not _slower(found[-1], known) else None
        layer.load(inputs.scenario, inputs)
        if check is not None:
            break
        again.append(median(runner.run(next(numbers), beat, count).samples))
    else:
        if _slower(min(found), min(again)):
            return (
                f"forwards on inputs that nothing had seen take {min(found):.3g} ms, on those of the "
                f"passes {known:.3g} ms, as if results were remembered"
            )
        layer.load(inputs.scenario, fresh)
        runner.run(0, beat, count)
        check = layer.check(checker.of(fresh, count))
        layer.load(inputs.scenario, inputs)
    return f"outputs on inputs that nothing had seen are wrong: {check.reason}" if check.reason else ""


def _slower(new: float, known: float) -> bool:
    return new > SLOWER * known and new - known > LEAST


def _known(runner: PassRunner, count: int) -> float:
    """Return the milliseconds that the first `count` forwards of the passes took.

    The median is the latency, and throughput follows from the average: neither may be too low.
    """
    pairs = [pair for one in runner.samples.passes for pair in zip(runner.steps.timed, one, strict=True)]
    taken = [ms for index, ms in pairs if index < count]
    return min(median(taken), fmean(taken))
