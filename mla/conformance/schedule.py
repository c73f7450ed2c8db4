"""How long a run takes and how far it is, told on stderr while pytest runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mla.command.console import note
from mla.command.progress import Progress
from mla.conformance.registry import LAYER, OP
from mla.conformance.report.made import Results, id_of

SAY_FROM = 5.0  # seconds; who waits less need not be told
SAMPLED = 8  # cases of a check from which the time of others is estimated, if it has as many


class Schedule:
    """A plugin of one pytest: the device and one check of every op run first, to estimate the rest."""

    def __init__(self, results: Results) -> None:
        self.suite, self.results = results.suite, results.by_id
        planned = self.suite.planned
        self.cases = {one.id: one.count(self.suite.subject) for one in planned}
        # What takes about the same time per case.
        self.group = {one.id: (one.check.scope, one.check.kind, one.of, one.dtype) for one in planned}
        samples: dict[tuple[object, ...], str] = {}
        for name in sorted(self.cases, key=self._rank):
            samples.setdefault(self.group[name], name)
        of_ops = [one.id for one in planned if one.check.scope in (OP, LAYER)]
        self.first = set(self.cases) - set(of_ops) | set(samples.values())
        self.progress = Progress(sum(self.cases.values()))

    def _rank(self, name: str) -> tuple[bool, int]:
        """Return how well a check suits as a sample, the best lowest: short, but not of a case or two."""
        few = self.cases[name] < SAMPLED
        return few, -self.cases[name] if few else self.cases[name]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Let the samples run first."""
        items.sort(key=lambda item: id_of(item) not in self.first)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        """Show the bar."""
        with self.progress:
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Count the cases of a check."""
        name = id_of(item)
        left = self.cases[name]

        def beat() -> None:
            nonlocal left
            left -= 1
            self.progress.advance(name, 1)

        self.suite.beat = beat
        self.progress.advance(name, 0)
        ended = yield
        self.progress.advance(name, left)
        if len(self.results) == len(self.first):
            self._say()
        return ended

    def _say(self) -> None:
        left = self.expected()
        seconds = left + sum(one.seconds for one in self.results.values())
        if seconds >= SAY_FROM:
            what = f"{len(self.cases)} checks, {sum(self.cases.values())} cases"
            note(f"{what}: about {duration(seconds)} in all, {duration(left)} from now")

    def expected(self) -> float:
        """Return the seconds that the checks without a result will take, from those of their groups."""
        per_case = {self.group[name]: one.seconds / self.cases[name] for name, one in self.results.items()}
        left = self.cases.keys() - self.results.keys()
        return sum(per_case.get(self.group[name], 0.0) * self.cases[name] for name in left)


def duration(seconds: float) -> str:
    """Return "40 s" or "6 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{round(seconds / 60)} min"
