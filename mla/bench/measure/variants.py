"""Variants: the ways of timing that a run applies to each of its implementations.

A variant is a mode (eager, or replayed from graphs), a cache state (warm, or flushed before every timed
forward) and a clock (the host's, or the device's own). Eager, warm, host is the headline and always timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

from mla.bench.workload.scenario import Scenario
from mla.errors import MLAError, UsageError, did_you_mean
from mla_backends.api import Backend
from mla_backends.errors import describe

Mode = Literal["eager", "graph"]
Cache = Literal["warm", "cold"]
Clock = Literal["host", "device"]
Value = TypeVar("Value", bound=str)

# Passes of a variant other than the headline: the fewest that give a 95 % interval.
EXTRA_PASSES = 6
# Forwards of such a pass in prefill, where all are alike.
EXTRA_FORWARDS = 5
# Timed steps of a cold decode pass, if it has as many: a flush takes longer than a step.
COLD_STEPS = 10
# Minimum of forwards whose stages are timed: whole passes, so that a growing cache counts as in the headline.
STAGE_FORWARDS = 20


class VariantError(MLAError):
    """A way of timing that this backend does not support."""

    exit_code = 3


@dataclass(frozen=True)
class Variant:
    """One way of timing."""

    mode: Mode = "eager"
    cache: Cache = "warm"
    clock: Clock = "host"

    def __str__(self) -> str:
        return f"{self.mode}, {self.cache} cache, {self.clock} clock"

    @property
    def kind(self) -> str:
        """Return the short name (`mla.bench.results.cases.KINDS`); "" for the headline."""
        values = (self.mode, self.clock, self.cache)
        return "_".join(value for value in values if value in ("graph", "device", "cold"))


HEADLINE = Variant()


@dataclass(frozen=True)
class Variants:
    """All that a run times, the headline first."""

    timed: tuple[Variant, ...] = (HEADLINE,)
    graphs_required: bool = False  # requested with --mode: an error if the first implementation has none
    asked: bool = False  # with an option: none is left out to save time

    def __str__(self) -> str:
        """Return, for example, "eager, graph; warm, cold; host and device clock"."""
        values = zip(*((v.mode, v.cache, v.clock) for v in self.timed), strict=True)
        modes, caches, clocks = map(list, map(dict.fromkeys, values))
        return f"{', '.join(modes)}; {', '.join(caches)}; {' and '.join(clocks)} clock"


@dataclass(frozen=True)
class Wanted:
    """The values of `--mode`, `--cache` and `--clock`. None means whatever the backend supports."""

    modes: tuple[Mode, ...] | None = None
    caches: tuple[Cache, ...] | None = None
    clocks: tuple[Clock, ...] | None = None


MODES: Sequence[Mode] = ("eager", "graph")
CACHES: Sequence[Cache] = ("warm", "cold")
CLOCKS: Sequence[Clock] = ("host", "device")


def parse(mode: str | None, cache: str | None, clock: str | None) -> Wanted:
    """Read the comma-separated values of the three options. Raises `UsageError`; needs no backend."""
    return Wanted(
        _values("--mode", mode, MODES), _values("--cache", cache, CACHES), _values("--clock", clock, CLOCKS)
    )


def available(wanted: Wanted, backend: Backend) -> Variants:
    """Return every combination of the wanted values, and the headline.

    Graphs and a device timer that the backend lacks are omitted by default. Raises `VariantError` if they
    were requested.
    """
    modes, clocks = list(wanted.modes or MODES), list(wanted.clocks or CLOCKS)
    if "device" in clocks and backend.device_timer() is None:
        if wanted.clocks:
            raise VariantError(f"backend '{backend.name}' has no device timer (required by --clock device).")
        clocks.remove("device")
    if "graph" in modes and (problem := _no_graphs(backend)):
        if wanted.modes:
            raise VariantError(f"{problem} (required by --mode graph).")
        modes.remove("graph")
    combined = [Variant(*values) for values in product(modes, wanted.caches or CACHES, clocks)]
    timed = tuple(dict.fromkeys((HEADLINE, *combined)))
    return Variants(timed, graphs_required=wanted.modes is not None, asked=wanted != Wanted())


def _values(option: str, given: str | None, known: Sequence[Value]) -> tuple[Value, ...] | None:
    if given is None:
        return None
    words: list[str] = [word.strip() for word in given.split(",") if word.strip()]
    for word in words:
        if word not in known:
            hint = did_you_mean(word, list(known))
            raise UsageError(f"{option} takes {' and '.join(known)}, got '{word}'.{hint}")
    if not words:
        raise UsageError(f"{option} takes {' and '.join(known)}, got nothing.")
    return tuple(known[known.index(word)] for word in dict.fromkeys(words))


def _no_graphs(backend: Backend) -> str:
    """Return why nothing can be captured, as one clause; "" if capturing a small addition works."""
    import torch

    number = torch.zeros(1, device=backend.device)

    def add() -> None:
        number.add_(1)

    try:
        if backend.graph(add) is not None:
            return ""
    except Exception as error:  # noqa: BLE001  # a stack raises anything when it cannot capture
        return f"backend '{backend.name}' cannot capture graphs: {describe(error)}"
    option = ", or only with -O graph=on" if "graph" in backend.known_options() else ""
    return f"backend '{backend.name}' offers no graphs{option}"


@dataclass(frozen=True)
class Steps:
    """The forwards of a variant's pass, those of them that are timed, and the number of passes."""

    run: range
    timed: range
    passes: int

    def due(self, index: int, rounds: int) -> bool:
        """Return whether round `index` has a pass of this variant: its passes are spread over all rounds."""
        return (index + 1) * self.passes // rounds > index * self.passes // rounds

    def method(self) -> str:
        """Return which steps are timed, unless all are."""
        return "" if self.run == self.timed else f"every {self.timed.step}th step of a pass timed"


def steps(variant: Variant, scenario: Scenario) -> Steps:
    """Return what one variant of a scenario runs."""
    every = range(scenario.steps)
    if variant == HEADLINE:
        return Steps(every, every, scenario.rounds)
    passes = min(scenario.rounds, EXTRA_PASSES)
    if scenario.mode == "prefill":
        some = range(min(scenario.steps, EXTRA_FORWARDS))
        return Steps(some, some, passes)
    stride = max(1, scenario.steps // COLD_STEPS) if variant.cache == "cold" else 1
    return Steps(every, range(stride // 2, scenario.steps, stride), passes)


def forwards(variants: Sequence[Variant], scenario: Scenario) -> int:
    """Return roughly the forwards of one implementation, checks and warm-ups included."""
    extra = [steps(variant, scenario) for variant in variants if variant != HEADLINE]
    warmed = sum(variant.cache == "warm" and variant.clock == "host" for variant in variants)
    headline = scenario.inputs + warmed * scenario.warmups + scenario.rounds * scenario.steps
    return headline + sum((plan.passes + 1) * len(plan.run) for plan in extra)


def stage_forwards(scenario: Scenario) -> int:
    """Return how many forwards are timed for `--stages`: whole passes, each prefill being one."""
    return scenario.inputs * -(-STAGE_FORWARDS // scenario.inputs)
