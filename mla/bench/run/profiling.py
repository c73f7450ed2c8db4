"""`--profile`: once everything is timed, record another pass of every case that has a number.

Nothing of it is on the clock, and nothing a profiler leaves behind in the process can slow a timed pass.
Whatever goes wrong is a note: the result is complete.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

from mla.bench import results
from mla.bench.measure import profile as passes
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.run.watchdog import Budget, Watchdog
from mla.bench.subjects.fixture import make_fixture
from mla.command import exit_codes
from mla.command.console import note
from mla.command.display import Progress
from mla.command.exit_codes import Exit, interrupted
from mla.command.files import write_bytes
from mla.errors import ResultError
from mla_backends.errors import first_line

VIEWERS = "open it at https://ui.perfetto.dev or chrome://tracing"


class Profiling:
    """The passes to record, and the trace they make."""

    def __init__(self, request: Request, run: results.Run, hang_after: float, code: Exit) -> None:
        self._request, self._code = request, code
        self._numbers = {(case.scenario, case.implementation) for case in run.cases if case.latency_ms}
        self._watchdog = Watchdog(hang_after, self._hung)
        self._case = "the start"
        self.trace = passes.Trace()

    def record(self, budget: Budget) -> Exit:
        """Record every case; return the exit code of the run, another one if this is interrupted."""
        try:
            with Progress(len(self._numbers)) as progress, self._watchdog:
                for scenario, names in self._planned():
                    if budget.left() <= 0:
                        note(f"--budget leaves no time to profile {scenario.name} and what follows")
                        break
                    self._scenario(scenario, names, progress)
        except KeyboardInterrupt:
            note("profiling was interrupted: the result is complete, the trace is not")
            return interrupted()
        except Exception as error:  # noqa: BLE001  # a profiler must not cost a run
            said = f"{type(error).__name__}: {first_line(error)} ({exit_codes.place(error)})"
            note(f"profiling failed at {self._case}: {said}; the result is complete")
        return self._code

    def _planned(self) -> Iterator[tuple[ScenarioPlan, list[str]]]:
        for scenario in self._request.scenarios:
            names = [name for name in self._request.implementations if (scenario.name, name) in self._numbers]
            if names:
                yield scenario, names

    def _scenario(self, scenario: ScenarioPlan, names: list[str], progress: Progress) -> None:
        """Record one implementation after the other, each built alone."""
        point, backend = scenario.point, scenario.setting.backend
        fixture = make_fixture(scenario.setting, point, self._request.state)
        inputs = fixture.inputs()
        for name in names:
            self._case = f"{scenario.name} / {name}"
            progress.advance(f"profiling {self._case}", 0)
            self._watchdog.enter(name)
            with self._watchdog.watching(scenario.name):
                impl = passes.with_ranges(fixture.build(name))
                impl.load(point, inputs)
                self.trace.add(passes.record(impl, point, backend.synchronize, self._watchdog.beat))
            del impl
            progress.advance(f"profiling {self._case}", 1)
        backend.empty_cache()

    def _hung(self, scenario: str, implementation: str) -> None:
        note(f"profiling hung at {scenario} / {implementation} and was stopped; the result is complete")
        os._exit(self._code)


def profile(
    request: Request, run: results.Run, target: Path, budget: Budget, hang_after: float, code: Exit
) -> Exit:
    """Write the trace of one more pass of every case with a number; return the exit code of the run."""
    profiling = Profiling(request, run, hang_after, code)
    code = profiling.record(budget)
    recorded = profiling.trace
    if not recorded.passes:
        note(f"profile    nothing was recorded, so '{target}' was not written")
        return code
    try:
        data = recorded.encode()
        write_bytes(gzip.compress(data) if target.suffix == ".gz" else data, target)
    except ResultError as error:
        note(f"profile    {error}")
        return code
    note(f"profile    {_summary(recorded, request)} in '{target}': {VIEWERS}")
    return code


def _summary(recorded: passes.Trace, request: Request) -> str:
    """Return what the trace holds, and what it lacks."""
    device = request.setting.device
    count = f"{recorded.passes} pass{'es' * (recorded.passes > 1)}"
    said = f"{count}, eager, with {recorded.operators} operators of torch"
    if recorded.launches:
        return f"{said} and {recorded.launches} kernels"
    names = ", ".join(activity.name for activity in passes.activities(device))
    lacking = f" and no kernels of {device.type} (this torch records: {names})"
    return said + lacking * (device.type != "cpu")
