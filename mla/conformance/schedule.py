"""The run of a suite: in which order, how long it will take, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mla.command.console import note
from mla.command.progress import Progress
from mla.conformance.failures import Keeper
from mla.conformance.registry import LAYER, OP
from mla.conformance.report import CheckResult
from mla.conformance.suite import Instance, carry_out
from mla.conformance.trial import BackendUnderTest
from mla.conformance.xfails import Xfails

SAY_FROM = 5.0  # seconds; who waits less need not be told
SAMPLED = 8  # cases of a check from which the time of others is estimated, if it has as many
SLOWEST = 10  # checks that --verbose names at the end


@dataclass(frozen=True)
class Step:
    """A check of one subject, and how many of its cases will run."""

    instance: Instance
    cases: int

    @property
    def rank(self) -> tuple[bool, int]:
        """How well the check suits as a sample: short, but not of a case or two."""
        few = self.cases < SAMPLED
        return few, -self.cases if few else self.cases

    @property
    def group(self) -> tuple[object, ...]:
        """What checks have in common that take about the same time per case."""
        check = self.instance.check
        return (check.scope, check.kind, self.instance.of, self.instance.dtype)


def steps(planned: Sequence[Instance], subject: BackendUnderTest) -> tuple[Step, ...]:
    """Choose the cases of every check: a few where the device is slow."""
    return tuple(_step(one.spared(subject), subject) for one in planned)


def _step(instance: Instance, subject: BackendUnderTest) -> Step:
    if instance.chosen is not None:
        return Step(instance, len(instance.chosen))
    if instance.check.scope not in (OP, LAYER):  # counting their cases would take as long as running them
        return Step(instance, 1)
    return Step(instance, max(1, len(instance.labels(subject))))


def order(planned: Sequence[Step]) -> tuple[list[int], list[int]]:
    """Return the indices of what runs first, from which the time of the others is estimated, and of those.

    The device comes first, and then of every op in every dtype the smallest check of some cases.
    """
    device = [i for i, one in enumerate(planned) if one.instance.check.scope not in (OP, LAYER)]
    samples: dict[tuple[object, ...], int] = {}
    for index in sorted(set(range(len(planned))) - set(device), key=lambda i: planned[i].rank):
        samples.setdefault(planned[index].group, index)
    first = [*device, *sorted(samples.values())]
    return first, sorted(set(range(len(planned))) - set(first))


@dataclass
class Run:
    """Carries a suite out, with a progress bar, and says once how long it will take."""

    subject: BackendUnderTest
    xfails: Xfails
    verbose: bool = False
    keeper: Keeper | None = None
    found: dict[int, CheckResult] = field(default_factory=dict)  # by place in the plan

    def carry_out(self, planned: Sequence[Step]) -> tuple[list[CheckResult], bool]:
        """Return the results in the order of the plan, and whether the user ended it."""
        first, then = order(planned)
        interrupted = False
        with Progress(sum(one.cases for one in planned)) as progress:
            try:
                for index in first:
                    self._one(index, planned[index], progress)
                self._say(planned, then)
                for index in then:
                    self._one(index, planned[index], progress)
            except KeyboardInterrupt:
                interrupted = True
        if self.verbose:
            note(slowest(self.found.values()))
        return [self.found[index] for index in sorted(self.found)], interrupted

    def _one(self, index: int, step: Step, progress: Progress) -> None:
        one, left = step.instance, [step.cases]

        def beat() -> None:
            left[0] -= 1
            progress.advance(one.id, 1)

        if self.verbose:
            note(one.id)
        progress.advance(one.id, 0)
        result = carry_out(one, self.subject, self.xfails, beat)
        self.found[index] = result
        if self.keeper is not None:
            self.keeper.see(one, result)
        progress.advance(one.id, left[0])

    def _say(self, planned: Sequence[Step], then: Sequence[int]) -> None:
        left = expected(planned, self.found, then)
        seconds = left + sum(one.seconds for one in self.found.values())
        if seconds >= SAY_FROM:
            what = f"{len(planned)} checks, {sum(one.cases for one in planned)} cases"
            note(f"{what}: about {duration(seconds)} in all, {duration(left)} from now")


def expected(planned: Sequence[Step], found: dict[int, CheckResult], then: Sequence[int]) -> float:
    """Return the seconds that the steps `then` will take, from those of their groups that have run."""
    per_case: dict[tuple[object, ...], float] = {}
    for index, result in found.items():
        per_case[planned[index].group] = result.seconds / planned[index].cases
    return sum(per_case.get(planned[index].group, 0.0) * planned[index].cases for index in then)


def slowest(found: Iterable[CheckResult]) -> str:
    """Return the checks that took longest, and their seconds."""
    longest = sorted(found, key=lambda one: one.seconds, reverse=True)[:SLOWEST]
    return f"slowest: {', '.join(f'{one.id} {one.seconds:.1f} s' for one in longest)}"


def duration(seconds: float) -> str:
    """Return "40 s" or "6 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{round(seconds / 60)} min"
