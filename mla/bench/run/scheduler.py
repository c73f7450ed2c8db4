"""The loop over scenarios: their order, what is skipped and why, what is kept of a run that ends early."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from mla.bench import results
from mla.bench.limits import roofline
from mla.bench.limits.roofline import RooflineModel
from mla.bench.measure import samples
from mla.bench.measure.engine import Hooks, too_large
from mla.bench.measure.target import MAX_S, TARGET_S, Target
from mla.bench.plan.memory import available_memory
from mla.bench.plan.request import Request, ScenarioPlan, empty_run
from mla.bench.results.cases import added_baselines, label
from mla.bench.run.scenario_run import ScenarioRun
from mla.bench.run.steering import Steering
from mla.bench.run.watchdog import OVER_BUDGET, Watchdog
from mla.bench.terminal.digits import number, quoted, unreliable
from mla.bench.workload.implementations import parse_one
from mla.bench.workload.scenario import spoken
from mla.command import exit_codes
from mla.command.console import note
from mla.command.display import Progress
from mla.command.exit_codes import Exit, end_early
from mla.errors import MLAError
from mla.text import counted
from mla_backends import BackendError
from mla_backends.errors import describe, first_line, plugin_code

Advance = Callable[[str, float], None]  # what is running, forwards done since the last call


def measure(request: Request, empty: results.Run | None = None, steering: Steering | None = None) -> Outcome:
    """Run a request with a progress bar, or with lines where stderr is not a terminal.

    `empty` is the result without cases.
    """
    empty, steering = empty or empty_run(request), steering or Steering()
    with Progress(sum(map(request.forwards, request.points))) as progress:
        if len(request.scenarios) > 1:
            steering = replace(steering, log=progress.say)
        return _Scheduler(request, empty, progress.advance, steering).run()


class _Scheduler:
    """Runs every scenario in a seeded order, its implementations interleaved where memory allows it."""

    def __init__(self, request: Request, empty: results.Run, advance: Advance, steering: Steering) -> None:
        self._request, self._empty, self._advance, self._steering = request, empty, advance, steering
        self._cases = {(case.scenario, case.implementation): case for case in steering.kept}
        self._limits: list[RooflineModel] = []
        self._latest = self._result()
        self._watchdog = Watchdog(steering.hang_after, self._hung)
        self._number = 0
        self._bar = 0  # what is left of the progress bar for the present scenario, in forwards
        self._refusal: MLAError | BackendError | None = None  # why the first case that was not run was not

    def run(self) -> Outcome:
        """Visit every scenario once."""
        if self._request.setting.ranks is not None:
            self._request.setting.ranks.when_lost(self._lost)
        order = list(self._request.scenarios)
        random.Random(self._request.setting.seed).shuffle(order)
        with self._watchdog:
            for scenario in order:
                self._number += 1
                ended = self._visit(scenario)
                if ended is not None:
                    return ended
        result = self._result()
        nothing = not any(case.latency_ms for case in subjects(result.cases))
        nothing &= not any(case.check.status in ("wrong", "doubtful") for case in _asked_for(result))
        return Outcome(result, failure=self._refusal if nothing else None)

    def _visit(self, scenario: ScenarioPlan) -> Outcome | None:
        """Measure what is missing of a scenario; return an outcome if the run ends here."""
        names = self._missing(scenario)
        self._bar = self._request.forwards(scenario.point)
        done = [case for case in self._cases.values() if case.scenario == scenario.name]
        work = ScenarioRun(self._request, scenario, self._tick, self._hooks(), self._steering.keeper, done)
        self._limits.append(work.ceilings)
        try:
            if names:
                with plugin_code():
                    self._measure(work, scenario, names)
        except KeyboardInterrupt:
            self._keep(work.not_run(self._missing(scenario), "interrupted", interrupted=True))
            return Outcome(self._result(), interrupted=True)
        except Exception as error:  # noqa: BLE001  # whatever a plugin raises, finished cases must survive
            if len(self._request.scenarios) == 1 or not too_large(error):  # others may go well
                return Outcome(self._result(), failure=failure_of(scenario.name, error))
            self._refusal = self._refusal or failure_of(scenario.name, error)
            reason = first_line(error) or type(error).__name__
            note(f"{scenario.name} is skipped: {reason}")
            self._keep(work.not_run(self._missing(scenario), reason))
        self._refusal = self._refusal or work.refusal
        self._advance(self._place(), self._bar)  # with what was planned and not done
        cases = [self._cases[scenario.name, name] for name in names]
        if any(case.check.status != "not run" for case in cases):
            self._latest = self._result()
            self._steering.save(self._latest)
            self._steering.log(f"{self._place()}  {scenario.name}: {', '.join(map(_in_short, cases))}")
        if work.prepared:
            del work
            gc.collect()  # weights and oracle are gone before the next ones are made
            self._request.setting.backend.empty_cache()
        return Outcome(self._result(), interrupted=True) if any(case.interrupted for case in cases) else None

    def _tick(self, what: str, done: int) -> None:
        """Advance the bar by so many forwards, but by no more than it has for this scenario."""
        self._watchdog.beat()
        done = min(done, self._bar)
        self._bar -= done
        self._advance(f"{self._place()}  {what}", done)

    def _missing(self, scenario: ScenarioPlan) -> list[str]:
        """Return the implementations that have not run a scenario yet."""
        return [name for name in self._request.implementations if (scenario.name, name) not in self._cases]

    def _place(self) -> str:
        return f"{self._number} of {len(self._request.scenarios)}"

    def _measure(self, work: ScenarioRun, scenario: ScenarioPlan, names: list[str]) -> None:
        """Measure implementations, side by side where memory allows it, except those that are refused."""
        for name in [name for name in names if name in scenario.refused]:
            work.refuse(name, scenario.refused[name])
            self._keep(work.not_run([name], scenario.refused[name]))
        names = [name for name in names if name not in scenario.refused]
        memory = replace(scenario.memory, available=available_memory(scenario.setting.backend))
        if names and not memory.fits:
            note(f"{scenario.name} is skipped: it needs {memory.shortage()}")
            self._keep(work.not_run(names, f"it needs {memory.shortage()}"))
        if not names or not memory.fits or self._is_late(work, names, "limits and checks"):
            return
        if not memory.side_by_side:
            note(
                f"{scenario.name} is not interleaved: the implementations do not fit into memory together, "
                "so each runs alone"
            )
        work.measure_limits()
        if self._is_late(work, names, "oracle and checks"):
            return
        work.prepare()
        waiting = [names] if memory.side_by_side else [[name] for name in names]
        done: list[results.Case] = []
        while waiting:
            together = waiting.pop(0)
            try:
                with self._watchdog.watching(scenario.name):
                    cases = work.measure(together)
            except Exception as error:
                added = self._watchdog.implementation in self._request.added
                if self._request.setting.ranks is not None or not (added or too_large(error)):
                    raise
                waiting = [*self._after(error, work, scenario, together), *waiting]
                continue
            self._keep(cases)
            done += cases
            if any(case.interrupted for case in cases):
                self._keep(work.not_run(self._missing(scenario), "interrupted", interrupted=True))
                return
        samples.compare(done, work.outputs)
        cut = [case.implementation for case in done if case.check.status == "ok" and not case.passes]
        self._keep(
            work.not_run(cut, f"{OVER_BUDGET}: after the checks, no timed pass fitted into what was left")
        )

    def _is_late(self, work: ScenarioRun, names: Sequence[str], what: str) -> bool:
        """Return whether the time is over before something begins; then leave these out."""
        if reason := self._steering.budget.short(0.0, what):
            self._keep(work.not_run(names, reason))
        return bool(reason)

    def _after(
        self, error: Exception, work: ScenarioRun, scenario: ScenarioPlan, names: list[str]
    ) -> list[list[str]]:
        """Return what is tried again after an error: each alone where memory ran out, else all the others."""
        failure = failure_of(scenario.name, error)  # holds no frames, which would keep weights alive
        error.__traceback__ = None
        gc.collect()
        self._request.setting.backend.empty_cache()
        if too_large(error) and len(names) > 1:
            note(f"{scenario.name} is not interleaved: memory ran out, so each implementation runs alone")
            return [[name] for name in names]
        failed = names[0] if len(names) == 1 else self._watchdog.implementation
        if failed not in self._request.added:
            self._refusal = self._refusal or failure
        reason = first_line(error) or type(error).__name__
        note(f"{scenario.name}, {failed} is skipped: {reason}")
        self._keep(work.not_run([failed], reason))
        rest = [name for name in names if name != failed]
        return [rest] if rest else []

    def _hooks(self) -> Hooks:
        """Return the engine's hooks: what the user gave ends the passes, and else the time of a scenario."""
        budget = self._steering.budget
        given = self._request.options.counted or budget.seconds is not None
        target = Target() if given else Target(TARGET_S, MAX_S)
        return Hooks(budget.short, self._watchdog.enter, self._watchdog.beat, target=target)

    def _keep(self, cases: Sequence[results.Case]) -> None:
        self._cases |= {(case.scenario, case.implementation): case for case in cases}

    def _result(self) -> results.Run:
        """Return the run so far, its cases in the workload's order, all under the highest limits known."""
        names = self._request.implementations
        keys = [(scenario.name, name) for scenario in self._request.scenarios for name in names]
        used = [ceiling for model in self._limits for ceiling in model.used()]
        ceilings = roofline.merged([*self._steering.ceilings, *used])
        cases = [self._cases[key] for key in keys if key in self._cases]
        for case in cases:
            roofline.place_case(case, ceilings)
        return msgspec.structs.replace(self._empty, cases=cases, ceilings=ceilings)

    def _hung(self, scenario: str, implementation: str) -> None:
        limit, ranks = spoken(self._steering.hang_after), self._request.setting.ranks
        who = (ranks.behind() if ranks else "") or "the device"
        sentence = (
            f"scenario '{scenario}', implementation '{implementation}': no forward finished in {limit}, so "
            f"{who} is assumed to hang; raise --hang-after to wait longer."
        )
        if ranks is not None:
            ranks.leave(sentence.rstrip("."), Exit.BACKEND)
        self._steering.hung(self._latest, sentence)

    def _lost(self, error: MLAError) -> None:
        """End the run, whatever this rank waits for: another one is gone."""
        self._steering.hung(self._latest, str(error), Exit(error.exit_code))


def _in_short(case: results.Case) -> str:
    if case.latency_ms is None:
        return f"{case.implementation} {case.check.status}"
    estimate = case.latency_ms.median, case.latency_ms.ci95
    known = quoted(*estimate, "ms") if unreliable(*estimate) else f"{number(estimate[0])} ms"
    return f"{label(case)} {known}"


# ------------------------------------------------------------------------------------------- how a run ended


@dataclass(frozen=True)
class Outcome:
    """A run, complete or cut short by an interrupt or by an error; finished cases are kept."""

    run: results.Run
    interrupted: bool = False
    failure: MLAError | BackendError | None = None


class RunFailed(MLAError):
    """An op, a backend or torch raised while a scenario ran."""

    exit_code = 3


def failure_of(scenario: str, error: Exception) -> MLAError | BackendError:
    """Return what to print: our own sentence, or what was raised and where."""
    if isinstance(error, BackendError) and (op := exit_codes.op_name(error)):
        return RunFailed(f"scenario '{scenario}' failed: {op}: {str(error).rstrip('.')}.")
    if isinstance(error, (MLAError, BackendError)):
        return error.with_traceback(None)  # whose frames would keep weights alive
    return RunFailed(f"scenario '{scenario}' failed: {describe(error)} ({exit_codes.place(error)}).")


def verdict(outcome: Outcome) -> Exit:
    """Return the exit code of a run, and say on stderr why it is not 0. Raises what made the run fail.

    Baselines that nobody asked for do not count.
    """
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.interrupted:
        return end_early()
    if wrong := _cases(outcome, "wrong"):
        note(f"wrong result: {wrong} got no number")
    if suspect := _cases(outcome, "doubtful"):
        note(f"suspect timing: {suspect} got no number")
    if wrong or suspect:
        return Exit.WRONG if wrong else Exit.DOUBTFUL
    if any(case.latency_ms for case in subjects(outcome.run.cases)):
        return Exit.OK
    if any(case.latency_ms for case in outcome.run.cases):
        names = dict.fromkeys(case.implementation for case in subjects(outcome.run.cases))
        note(f"{', '.join(names)} produced no result; only the baselines did")
    return Exit.NOTHING_RAN


def _cases(outcome: Outcome, status: str) -> str:
    """Return the number of cases with a status, such as "1 case"; "" if there is none."""
    count = sum(case.check.status == status for case in _asked_for(outcome.run))
    return counted(count, "case") * bool(count)


def _asked_for(run: results.Run) -> list[results.Case]:
    added = added_baselines(run)
    return [case for case in run.cases if case.implementation not in added]


def subjects(cases: Sequence[results.Case]) -> list[results.Case]:
    """Return the cases that a run is about: those of `mla`, or all if it was not asked for `mla`.

    A run that measured only baselines (`mla-reference`, `transformers`) did not do what it was for.
    """
    ours = [case for case in cases if parse_one(case.implementation).base == "mla"]
    return ours or list(cases)
