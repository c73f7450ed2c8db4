"""Lanes: the ways in which every implementation of a run is timed.

A lane is a mode (eager, or replayed from graphs), the state of the caches (warm, or swept before every timed
forward) and a clock (the host's, or the device's own). Eager, warm, host is the headline and always there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, cast

import torch

from mla.bench.workload.scenario import Scenario
from mla.errors import MLAError, UsageError, did_you_mean
from mla_backends.api import Backend
from mla_backends.errors import describe

Mode = Literal["eager", "graph"]
Cache = Literal["warm", "cold"]
Clock = Literal["host", "device"]

#: Passes of a lane beside the headline: the fewest that give a 95 % interval.
EXTRA_PASSES = 6
#: Forwards of such a pass in prefill, where each is like the other.
EXTRA_FORWARDS = 5
#: Timed steps of a cold decode pass at least, where it has them: sweeping takes longer than a step.
COLD_STEPS = 10


class LaneError(MLAError):
    """A way of timing that this backend does not have."""

    exit_code = 3


@dataclass(frozen=True)
class Kind:
    """One way of timing."""

    mode: Mode = "eager"
    cache: Cache = "warm"
    clock: Clock = "host"

    def __str__(self) -> str:
        return f"{self.mode}, {self.cache} cache, {self.clock} clock"


HEADLINE = Kind()


@dataclass(frozen=True)
class Lanes:
    """What a run times, the headline first."""

    kinds: tuple[Kind, ...] = (HEADLINE,)
    graphs_by_name: bool = False  # the user asked for graphs: a first implementation without is an error

    def __str__(self) -> str:
        """Return, for example, "eager, graph; warm, cold; host clock, device clock"."""
        modes, caches, clocks = (
            list(dict.fromkeys(values))
            for values in zip(*((kind.mode, kind.cache, kind.clock) for kind in self.kinds), strict=True)
        )
        return f"{', '.join(modes)}; {', '.join(caches)}; {' and '.join(clocks)} clock"


def choose(
    backend: Backend, mode: str | None = None, cache: str | None = None, clock: str | None = None
) -> Lanes:
    """Return every combination of the listed words (commas between them), and the headline.

    None takes what the backend has. Raises `UsageError` for a word that means nothing and `LaneError` for
    graphs or a clock that the backend lacks.
    """
    modes = cast("list[Mode]", _words("--mode", mode, ["eager", "graph"]))
    caches = cast("list[Cache]", _words("--cache", cache, ["warm", "cold"]))
    clocks = cast("list[Clock]", _words("--clock", clock, ["host", "device"]))
    if "device" in clocks and backend.device_timer() is None:
        _refuse(clock, f"backend '{backend.name}' has no clock of its own, which --clock device wants.")
        clocks.remove("device")
    if "graph" in modes and (problem := _no_graphs(backend)):
        _refuse(mode, f"{problem}, which --mode graph wants.")
        modes.remove("graph")
    kinds = [Kind(*words) for words in product(modes, caches, clocks)]
    return Lanes(tuple(dict.fromkeys((HEADLINE, *kinds))), graphs_by_name=mode is not None)


def _words(option: str, given: str | None, known: list[str]) -> list[str]:
    if given is None:
        return known
    words = [word.strip() for word in given.split(",") if word.strip()]
    for word in words:
        if word not in known:
            hint = did_you_mean(word, known)
            raise UsageError(f"{option} takes {' and '.join(known)}, got '{word}'.{hint}")
    if not words:
        raise UsageError(f"{option} takes {' and '.join(known)}, got nothing.")
    return list(dict.fromkeys(words))


def _refuse(given: str | None, sentence: str) -> None:
    """Raise `LaneError` for what was asked for by name; by default it is just not there."""
    if given is not None:
        raise LaneError(sentence)


def _no_graphs(backend: Backend) -> str:
    """Return why nothing can be captured, as one clause; "" when a small addition can."""
    number = torch.zeros(1, device=backend.device)

    def add() -> None:
        number.add_(1)

    try:
        if backend.graph(add) is not None:
            return ""
    except Exception as error:  # noqa: BLE001  # a stack raises anything when it cannot capture
        return f"backend '{backend.name}' captures no graphs ({describe(error)})"
    return f"backend '{backend.name}' offers no graphs, or an option forbids them"


@dataclass(frozen=True)
class Steps:
    """The forwards of a lane's pass, those of them that are timed, and how many passes there are."""

    run: range
    timed: range
    passes: int

    def due(self, turn: int, turns: int) -> bool:
        """Say whether the lane has a pass in this turn: its passes are spread over all turns."""
        return (turn + 1) * self.passes // turns > turn * self.passes // turns

    def method(self) -> str:
        """Say which steps are timed, where not all are."""
        return "" if self.run == self.timed else f"every {self.timed.step}th step of a pass timed"


def steps(kind: Kind, scenario: Scenario) -> Steps:
    """Return what one lane of a scenario runs."""
    every = range(scenario.steps)
    if kind == HEADLINE:
        return Steps(every, every, scenario.turns)
    passes = min(scenario.turns, EXTRA_PASSES)
    if scenario.mode == "prefill":
        some = range(min(scenario.steps, EXTRA_FORWARDS))
        return Steps(some, some, passes)
    stride = max(1, scenario.steps // COLD_STEPS) if kind.cache == "cold" else 1
    return Steps(every, range(stride // 2, scenario.steps, stride), passes)


def forwards(kinds: Sequence[Kind], scenario: Scenario) -> int:
    """Return the forwards that one implementation runs at least, checks and warm-ups included."""
    extra = [steps(kind, scenario) for kind in kinds if kind != HEADLINE]
    warmed = sum(kind.cache == "warm" and kind.clock == "host" for kind in kinds)
    headline = scenario.inputs + warmed * scenario.warmups + scenario.turns * scenario.steps
    return headline + sum((one.passes + 1) * len(one.run) for one in extra)
