"""The loop over scenarios: their order, what is skipped and why, what is kept of a run that ends early."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from mla.bench import results
from mla.bench.limits import placing
from mla.bench.limits.roofline import TIMES, RooflineModel
from mla.bench.measure import hooks as refusals
from mla.bench.measure.hooks import Hooks
from mla.bench.measure.target import MOST, SECONDS, Target
from mla.bench.plan import estimate
from mla.bench.plan.memory import MemoryPlan, available_memory
from mla.bench.plan.request import Request, ScenarioPlan, empty_run
from mla.bench.results.passes import due
from mla.bench.results.predicted import label
from mla.bench.run.budget import Pace
from mla.bench.run.outcome import Outcome, failure_of, subjects
from mla.bench.run.scenario_bar import Advance, ScenarioBar
from mla.bench.run.scenario_run import ScenarioRun
from mla.bench.run.steering import OVER_BUDGET, Steering
from mla.bench.run.watchdog import Watchdog
from mla.bench.terminal.digits import number, quoted, unreliable
from mla.bench.workload.quantities import rounded_up, spoken
from mla.command.console import note
from mla.command.exit_codes import Exit
from mla.command.progress import Progress
from mla.errors import MLAError
from mla_backends import BackendError
from mla_backends.errors import first_line, plugin_code

# Most of a run's time that its limits are measured for once more after the last case.
LIMITS_SHARE = 0.05
# How much longer than estimated a run may take: a budget that is too short again costs another run.
MARGIN = 1.5


def measure(request: Request, empty: results.Run | None = None, steering: Steering | None = None) -> Outcome:
    """Run a request with a progress bar, or with lines where stderr is not a terminal.

    `empty` is the result without cases.
    """
    empty, steering = empty or empty_run(request), steering or Steering()
    bounded = not request.counted and steering.budget.seconds is None
    ends = [seconds * len(request.scenarios) for seconds in (SECONDS, MOST)] if bounded else []
    with Progress(estimate.nominal_seconds(request), ends) as progress:
        if progress.hidden and len(request.scenarios) > 1:
            steering = replace(steering, log=note)
        return execute(request, empty, progress.advance, steering)


def execute(request: Request, empty: results.Run, advance: Advance, steering: Steering) -> Outcome:
    """Run every scenario in a seeded order, its implementations interleaved where memory allows it."""
    scheduler = _Scheduler(request, empty, advance, steering)
    return replace(scheduler.run(), needed=scheduler.needed())


class _Scheduler:
    def __init__(self, request: Request, empty: results.Run, advance: Advance, steering: Steering) -> None:
        self._request, self._empty, self._advance, self._steering = request, empty, advance, steering
        self._cases = {(case.scenario, case.implementation): case for case in steering.kept}
        self._limits: list[RooflineModel] = []
        self._start = time.monotonic()
        self._latest = self._result()
        self._nominal = estimate.nominal(request)
        limited = steering.budget.seconds is not None
        self._estimator = estimate.measured(request) if limited else self._nominal
        self._pace = Pace(steering.budget, 0.0)
        self._watchdog = Watchdog(steering.hang_after, self._hung)
        self._number = 0
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
            try:
                self._measure_limits_again()
            except KeyboardInterrupt:
                return Outcome(self._result(), interrupted=True)
        found = self._result()
        nothing = not any(case.latency_ms for case in subjects(found.cases))
        nothing &= not any(case.check.status in ("wrong", "doubtful") for case in found.cases)
        return Outcome(found, failure=self._refusal if nothing else None)

    def needed(self) -> float | None:
        """Return the seconds in which the whole run should end, rounded up; None without a budget."""
        budget, request = self._steering.budget, self._request
        if budget.seconds is None:
            return None
        fitting = [scenario for scenario in request.scenarios if scenario.memory.fits]
        names, estimator = request.implementations, self._estimator
        seconds = budget.corrected(sum(estimator.seconds(one, names) for one in fitting))
        if not budget.learned:  # what was learned has all of it
            seconds += sum(estimator.beside(one, names) for one in fitting)
        return rounded_up((budget.before or 0.0) + MARGIN * seconds)

    def _visit(self, scenario: ScenarioPlan) -> Outcome | None:
        """Measure what is missing of a scenario; return an outcome if the run ends here."""
        names = self._missing(scenario)
        bar = ScenarioBar(
            self._advance_to, self._place(), self._nominal, scenario, self._request.implementations
        )
        done = [case for case in self._cases.values() if case.scenario == scenario.name]
        work = ScenarioRun(self._request, scenario, bar.forwards, self._hooks(), self._steering.keeper, done)
        self._limits.append(work.ceilings)
        try:
            if names:
                with plugin_code():
                    self._measure(work, scenario, names)
        except KeyboardInterrupt:
            self._keep(work.interrupted(self._missing(scenario)))
            return Outcome(self._result(), interrupted=True)
        except Exception as error:  # noqa: BLE001  # whatever a plugin raises, finished cases must survive
            if not self._others_may_run(error):
                return Outcome(self._result(), failure=failure_of(scenario.name, error))
            self._refusal = self._refusal or failure_of(scenario.name, error)
            self._skip(work, scenario, self._missing(scenario), first_line(error) or type(error).__name__)
        self._refusal = self._refusal or work.refusal
        bar.finish()
        found = [self._cases[scenario.name, name] for name in names]
        if any(case.check.status != "not run" for case in found):
            self._settle(scenario, found)
        if work.prepared:
            del work
            gc.collect()  # weights and oracle are gone before the next ones are made
            self._request.setting.backend.empty_cache()
        return Outcome(self._result(), interrupted=True) if any(one.interrupted for one in found) else None

    def _measure_limits_again(self) -> None:
        """Measure the limits once more after all cases, in a small share of the time they took."""
        taken = time.monotonic() - self._start
        seconds = min(LIMITS_SHARE * taken, SECONDS * len(self._request.scenarios) - taken)
        for model in self._limits:
            if self._steering.budget.left() > 0:
                self._watchdog.beat()
                model.again(seconds / len(self._limits), TIMES + 1)

    def _settle(self, scenario: ScenarioPlan, found: Sequence[results.Case]) -> None:
        """Write the result so far, and log the scenario."""
        self._latest = self._result()
        self._steering.save(self._latest)
        self._steering.log(f"{self._place()}  {scenario.name}: {', '.join(map(_in_short, found))}")

    def _advance_to(self, what: str, seconds: float) -> None:
        self._watchdog.beat()
        self._advance(what, seconds)

    def _missing(self, scenario: ScenarioPlan) -> list[str]:
        """Return the implementations that have not run a scenario yet."""
        return [name for name in self._request.implementations if (scenario.name, name) not in self._cases]

    def _place(self) -> str:
        return f"{self._number} of {len(self._request.scenarios)}"

    def _measure(self, work: ScenarioRun, scenario: ScenarioPlan, names: list[str]) -> None:
        names = self._not_refused(work, scenario, names)
        if not names:
            return
        memory = scenario.memory.with_available(available_memory(scenario.setting.backend))
        budget = self._steering.budget
        if not memory.fits:
            self._skip(work, scenario, names, f"it needs {memory.shortage()}")
            return
        names = self._affordable(work, scenario, names)
        if not names:
            return
        self._pace = Pace(budget, self._estimator.one_pass(scenario, names, self._first))
        seconds, start = self._estimator.seconds(scenario, names, self._first), time.monotonic()
        self._interleave(work, memory, scenario, names)
        if self._complete(scenario, names):
            budget.learn(seconds, time.monotonic() - start)

    @property
    def _first(self) -> str:
        """The implementation that the others are compared with."""
        return self._request.implementations[0]

    def _affordable(self, work: ScenarioRun, scenario: ScenarioPlan, names: list[str]) -> list[str]:
        """Return the implementations that fit into the budget, maybe the first alone; skip the others."""
        budget = self._steering.budget
        left = budget.left()
        for some in (names, names[:1]):
            least = self._estimator.least(scenario, some, self._first)
            reason = _over_budget(budget.corrected(least), left, budget.seconds or 0.0)
            if budget.fits(least):
                return some
            self._keep(work.not_run(names[1:] if some is names else names, reason))
        return []

    def _complete(self, scenario: ScenarioPlan, names: Sequence[str]) -> bool:
        """Return whether nothing of a scenario was cut, so that its estimate can be judged."""
        cases = [self._cases[scenario.name, name] for name in names]
        return all(case.passes >= due(case, scenario.point.rounds) for case in cases)

    def _not_refused(self, work: ScenarioRun, scenario: ScenarioPlan, names: list[str]) -> list[str]:
        """Skip the implementations whose ops refuse the lengths; return the others."""
        for name in names:
            if name in scenario.refused:
                work.refuse(name, scenario.refused[name])
                self._keep(work.not_run([name], scenario.refused[name]))
        return [name for name in names if name not in scenario.refused]

    def _interleave(
        self, work: ScenarioRun, memory: MemoryPlan, scenario: ScenarioPlan, names: list[str]
    ) -> None:
        if not memory.side_by_side:
            note(
                f"{scenario.name} is not interleaved: the implementations do not fit into memory together, "
                "so each runs alone"
            )
        done: list[results.Case] = []
        work.prepare()
        for together in [names] if memory.side_by_side else [[name] for name in names]:
            self._pace.restart()
            with self._watchdog.watching(scenario.name):
                found = work.measure(together)
            self._keep(found)
            done += found
            if any(case.interrupted for case in found):
                rest = names[len(done) :]
                self._keep(work.interrupted(rest))
                return
        work.compare(done)
        cut = [case for case in done if case.check.status == "ok" and not case.passes]
        late = f"{OVER_BUDGET}: after the checks, no timed pass fitted into what was left"
        self._keep(work.not_run([case.implementation for case in cut], late))

    def _hooks(self) -> Hooks:
        """Return the engine's hooks: it stops when another pass of the slowest one would not fit."""
        budget = self._steering.budget
        over = None if budget.seconds is None else lambda: self._pace.over()
        given = self._request.counted or budget.seconds is not None  # what the user gave ends the passes
        target = Target() if given else Target(self._share(SECONDS, 2 * SECONDS), self._share(MOST, MOST))
        return Hooks(over, self._watchdog.enter, self._watchdog.beat, target=target)

    def _share(self, each: float, most: float) -> float:
        """Return the seconds of the next scenario, of so many for each: what others left over, or lack."""
        left = each * self._number - (time.monotonic() - self._start)
        return min(most, max(each / 2, left))

    def _others_may_run(self, error: Exception) -> bool:
        """Return whether other scenarios may go well: this one was too large."""
        return len(self._request.scenarios) > 1 and refusals.too_large(error)

    def _skip(self, work: ScenarioRun, scenario: ScenarioPlan, names: Sequence[str], reason: str) -> None:
        note(f"{scenario.name} is skipped: {reason}")
        self._keep(work.not_run(names, reason))

    def _keep(self, cases: Sequence[results.Case]) -> None:
        self._cases |= {(case.scenario, case.implementation): case for case in cases}

    def _result(self) -> results.Run:
        """Return the run so far, its cases in the workload's order, all under the highest limits known."""
        keys = [(one.name, name) for one in self._request.scenarios for name in self._request.implementations]
        used = [one for model in self._limits for one in model.used()]
        ceilings = placing.merged([*self._steering.ceilings, *used])
        cases = [self._cases[key] for key in keys if key in self._cases]
        for case in cases:
            placing.place_case(case, ceilings)
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


def _over_budget(least: float, left: float, budget: float) -> str:
    """Return why a case was not begun."""
    rest = f"{spoken(max(left, 0.0))} of {spoken(budget)} were left"
    return f"{OVER_BUDGET}: checks and one timed pass would take about {spoken(least)}, and {rest}"


def _in_short(case: results.Case) -> str:
    if case.latency_ms is None:
        return f"{case.implementation} {case.check.status}"
    estimate = case.latency_ms.median, case.latency_ms.ci95
    known = quoted(*estimate, "ms") if unreliable(*estimate) else f"{number(estimate[0])} ms"
    return f"{label(case)} {known}"
