"""Variants: the ways of timing that a run applies to each of its implementations.

A variant is a mode (eager, or replayed from graphs), a cache state (warm, or flushed before every timed
forward) and a clock (the host's, or the device's own). Eager, warm, host is the headline and always timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from mla.bench.workload.scenario import Scenario
from mla.errors import MLAError, UsageError, did_you_mean
from mla_backends.api import Backend
from mla_backends.errors import describe

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


# Option -> its values, the headline's first.
WAYS: Mapping[str, tuple[str, ...]] = {
    "mode": ("eager", "graph"),
    "cache": ("warm", "cold"),
    "clock": ("host", "device"),
}
Wanted = Mapping[str, Sequence[str]]  # option -> values that were asked for; without one, what is supported


@dataclass(frozen=True)
class Variant:
    """One way of timing: a value of each of `WAYS`."""

    mode: Literal["eager", "graph"] = "eager"
    cache: Literal["warm", "cold"] = "warm"
    clock: Literal["host", "device"] = "host"

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


def parse(mode: str | None, cache: str | None, clock: str | None) -> Wanted:
    """Read the comma-separated values of the three options. Raises `UsageError`; needs no backend."""
    wanted: dict[str, list[str]] = {}
    for name, given in zip(WAYS, (mode, cache, clock), strict=True):
        if given is None:
            continue
        takes = f"--{name} takes {' and '.join(WAYS[name])}, got"
        wanted[name] = list(dict.fromkeys(word.strip() for word in given.split(",") if word.strip()))
        for word in wanted[name]:
            if word not in WAYS[name]:
                raise UsageError(f"{takes} '{word}'.{did_you_mean(word, list(WAYS[name]))}")
        if not wanted[name]:
            raise UsageError(f"{takes} nothing.")
    return wanted


def available(wanted: Wanted, backend: Backend) -> Variants:
    """Return every combination of the wanted values, and the headline.

    Graphs and a device timer that the backend lacks are omitted by default. Raises `VariantError` if they
    were requested.
    """
    values: dict[str, list[Any]] = {name: list(wanted.get(name, known)) for name, known in WAYS.items()}
    for name, value, why in (("clock", "device", _no_timer), ("mode", "graph", _no_graphs)):
        if value in values[name] and (problem := why(backend)):
            if name in wanted:
                raise VariantError(f"{problem} (required by --{name} {value}).")
            values[name].remove(value)
    combined = [Variant(*each) for each in product(*values.values())]
    timed = tuple(dict.fromkeys((HEADLINE, *combined)))
    return Variants(timed, graphs_required="mode" in wanted, asked=bool(wanted))


def _no_timer(backend: Backend) -> str:
    return f"backend '{backend.name}' has no device timer" if backend.device_timer() is None else ""


def _no_graphs(backend: Backend) -> str:
    """Return why nothing can be captured, as one clause; "" if capturing a small addition works."""
    import torch

    number = torch.zeros(1, device=backend.device)
    try:
        if backend.graph(lambda: number.add_(1)) is not None:  # type: ignore[arg-type]  # result unused
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
