"""One way of computing a case, whoever offers it, how ways take turns, and how cases are judged.

A visit is a few untimed calls and then timed ones, back to back; its median is one sample. Ways are visited
once per round, in a seeded random order, so that the samples of a round belong together. Between visits
nothing runs for a moment: an OpenMP runtime's threads wait for work by spinning, and would take the cores
from the process that is next.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns as now_ns
from typing import TYPE_CHECKING

import torch

from benchmarks.peers.ggml import record
from benchmarks.peers.ggml.peer import Peer
from mla.bench.results import stats
from mla.command import console
from mla.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.peers.ggml.problems import Problem

VISIT_MS, WARM_MS = 30.0, 6.0  # of timed and of untimed calls
MOST_CALLS = 50
TRIALS, SLOW_TRIAL_MS = 2, 500.0
PAUSE = 0.03  # seconds; GNU's runtime spins for 5 to 15 ms
# What is timed no further: a way of the peer that takes so many times as long as its fastest; plain PyTorch
# from so many ms on, such as a product in bf16 on a CPU without instructions for it.
SLOW_PEER, SLOW_PLAIN_MS = 1.5, 2000.0


@dataclass
class Way:
    """One way of computing a case. `time(untimed, timed)` returns ms; `result` is that of one more call."""

    name: str
    party: str  # as in `record.Timing`
    dtype: str  # of the operands
    time: Callable[[int, int], list[float]]
    result: Callable[[], torch.Tensor]
    trial_ms: float = 0.0
    calls: int = 0  # timed, of a visit
    visits: list[float] = field(default_factory=list)  # median ms, by round

    def timing(self, truth: torch.Tensor) -> record.Timing:
        """Return what was measured, and how far the result is from the truth."""
        error = (self.result().double() - truth).norm() / truth.norm()
        return record.Timing(
            name=self.name, party=self.party, dtype=self.dtype,  # type: ignore[arg-type]
            ms=stats.median(self.visits), ci95=stats.median_interval(self.visits), visits_ms=self.visits,
            calls=self.calls, error=error.item() if error.isfinite() else record.NO_RESULT,
        )  # fmt: skip


def judged(problem: Problem, ways: Sequence[Way]) -> record.Case:
    """Return a case with the medians of all ways that were visited, and the errors of their results."""
    truth = problem.truth()
    return record.Case(
        name=problem.shape.name, op=problem.shape.op, flops=problem.case.work.flops,
        timings=[way.timing(truth) for way in ways if way.visits],
        passed_over={way.name: way.trial_ms for way in ways if not way.visits},
    )  # fmt: skip


def own(
    name: str, party: str, dtype: str, call: Callable[[], object], out: torch.Tensor,
    answer: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone,
) -> Way:  # fmt: skip
    """Return a function of this process that writes to `out`. `answer` turns that into what is judged."""

    def timed_calls(untimed: int, timed: int) -> list[float]:
        for _ in range(untimed):
            call()
        times = []
        for _ in range(timed):
            start = now_ns()
            call()
            times.append((now_ns() - start) / 1e6)
        return times

    def result() -> torch.Tensor:
        out.fill_(torch.nan if out.is_floating_point() else -1)
        call()
        return answer(out)

    return Way(name, party, dtype, timed_calls, result)


def compared(problem: Problem, peer: Peer, rounds: int, seed: int) -> record.Case:
    """Return a case whose ways have taken turns."""
    with contextlib.ExitStack() as work:
        console.note(f"timing {problem.shape.name}")
        ways = list(problem.ways(peer, work.callback))
        take_turns(try_out(ways), rounds, seed)
        return judged(problem, ways)


def require_passive_waiting() -> None:
    """Raise `UsageError` if threads without work would keep their cores from the other process."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        raise UsageError(
            "OMP_WAIT_POLICY=active makes idle threads take the cores of the peer's process, and the other "
            "way round: unset it."
        )


def try_out(ways: Sequence[Way]) -> list[Way]:
    """Time every way briefly, and return those that are worth timing further."""
    for way in ways:
        way.trial_ms = _trial(way)
        way.calls = min(max(int(VISIT_MS / way.trial_ms), 1), MOST_CALLS)
    limit = SLOW_PEER * min((way.trial_ms for way in ways if way.party == "peer"), default=math.inf)
    most = {"peer": limit, "reference": SLOW_PLAIN_MS}
    return [way for way in ways if way.trial_ms <= most.get(way.party, math.inf)]


def _trial(way: Way) -> float:
    """Return the ms of the fastest of a few calls; of one that is slow, those of the first alone."""
    time.sleep(PAUSE)
    best = way.time(0, 1)[0]
    for _ in range(0 if best > SLOW_TRIAL_MS else TRIALS):  # apart, as other work may disturb one of them
        time.sleep(PAUSE)
        best = min(best, *way.time(1, 3))
    return max(best, 1e-6)


def take_turns(ways: Sequence[Way], rounds: int, seed: int) -> None:
    """Visit every way once per round, each round in another order."""
    order, generator = list(ways), random.Random(seed)
    for _ in range(rounds):
        generator.shuffle(order)
        for way in order:
            time.sleep(PAUSE)
            untimed = min(max(int(WARM_MS / way.trial_ms), 1), MOST_CALLS)
            way.visits.append(statistics.median(way.time(untimed, way.calls)))
