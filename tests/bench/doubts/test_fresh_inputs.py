"""The probe with inputs that nothing has seen: a real layer, whose forwards take scripted times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mla
from mla.bench.doubts import clock, fresh_inputs
from mla.bench.doubts.fresh_inputs import FEWEST, LONGEST_REST, ROUNDS, doubt
from mla.bench.doubts.pass_times import PassTimes
from mla.bench.measure.variants import Steps
from mla.bench.subjects.inputs import expected_of, expected_outputs, make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.subjects.stack import MlaStack
from mla.bench.subjects.tokens import LayerChecker, LayerImplementation
from mla.bench.workload.scenario import Scenario
from mla.weights import random_state_dict

if TYPE_CHECKING:
    from mla import MLAConfig

PREFILL = Scenario(name="p", mode="prefill", query_lens=(3, 2), history=(4, 0), runs=12, passes=3)
DECODE = Scenario(name="d", mode="decode", query_lens=(1, 1), history=(4, 3), runs=10)
SHORT = Scenario(name="s", mode="decode", query_lens=(1,), history=(5,), runs=2)
STACK = Scenario(name="l", mode="decode", query_lens=(1, 1), history=(4, 3), runs=3, layers=2)
SCENARIOS = [PREFILL, DECODE, SHORT, STACK]

Ms = Callable[[int, int], float]  # of a round and a forward


class Timed:
    """A runner whose passes took 1 ms a forward, wall and CPU; `mutate` may spoil outputs."""

    def __init__(
        self, one: LayerImplementation, scenario: Scenario, ms: Ms, mutate: Any = lambda out, index: None
    ) -> None:
        self.implementation = self.forwards = one
        self.steps = Steps(range(scenario.steps), range(scenario.steps), scenario.passes)
        self.samples = SimpleNamespace(passes=[[1.0] * scenario.steps] * 3)
        self.passes = [PassTimes(forwards=scenario.steps, regions_cpu=float(scenario.steps))] * 3
        self.round, self.now, self.busy = -1, 0.0, True
        self.seen: list[torch.Tensor] = []
        self.rests: list[float] = []
        self.delayed: int | None = 0  # nanoseconds that others had the CPUs
        self.share: Ms = lambda number, index: 0.0  # of a forward, that they had them
        self._ms, self._mutate = ms, mutate

    def time_step(self, index: int) -> float:
        self.round += index == 0
        self.implementation.step(index)
        self.seen.append(self.implementation.x.clone())
        self._mutate(self.implementation.out, index)
        taken = self._ms(self.round, index)
        self.now += 1e6 * (taken if self.busy else 1.0)
        if self.delayed is not None:
            self.delayed += int(1e6 * taken * self.share(self.round, index))
        return taken


@pytest.fixture
def make(tiny: Callable[..., MLAConfig], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a maker of a runner and the checker of its scenario."""

    def make(scenario: Scenario, *script: Any, **changes: Any) -> tuple[Timed, LayerChecker]:
        config, dtype = tiny(**changes), torch.float32
        backend = mla.load_backend("cpu", threads=1)
        setting = Setting(config, backend, dtype, "auto", 16, 0, layers=scenario.layers)
        state, inputs = random_state_dict(config, 0, dtype), make_inputs(config, scenario, 0, dtype)
        kind = MlaStack if scenario.layers > 1 else MlaLayer
        one = kind(setting, state, "mla-reference", "reference")
        one.load(scenario, inputs)
        expected = expected_outputs(config, state, scenario, inputs)
        oracle = partial(expected_of, config, state, scenario, inputs.history)
        checker = LayerChecker(expected.plain, dtype, lambda: expected.plain, turned=expected, oracle=oracle)
        timed = Timed(one, scenario, *script)
        monkeypatch.setattr(fresh_inputs, "cpu_ns", lambda: timed.now)
        monkeypatch.setattr(fresh_inputs, "_sleep", timed.rests.append)
        monkeypatch.setattr(clock, "delayed_ns", lambda: timed.delayed)
        return timed, checker

    return make


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}])
def test_an_honest_layer_is_as_fast_and_right(make: Any, scenario: Scenario, changes: dict[str, Any]) -> None:
    beats: list[int] = []
    timed, checker = make(scenario, lambda number, index: 1.4, **changes)
    timed.implementation.restore(7)  # whatever turn came before
    assert doubt(timed, checker, lambda: beats.append(1)) == ""
    assert timed.round == 0
    assert len(beats) == len(timed.seen) == min(scenario.steps, 3 if scenario is PREFILL else 8)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_slow_in_all_rounds_is_doubted(make: Any, scenario: Scenario) -> None:
    timed, checker = make(scenario, lambda number, index: 5.2)
    assert doubt(timed, checker) == (
        "forwards on inputs that nothing had seen take 5.2 ms, on those of the passes 1 ms, as if results "
        "were remembered"
    )
    assert timed.round == ROUNDS - 1
    assert timed.rests == sorted(timed.rests), "it rests longer every time"
    assert timed.rests[:FEWEST] == [0] * FEWEST
    assert timed.rests[-1] == LONGEST_REST


@pytest.mark.parametrize("scenario", [PREFILL, DECODE], ids=lambda one: one.name)
def test_one_quiet_round_is_enough(make: Any, scenario: Scenario) -> None:
    timed, checker = make(scenario, lambda number, index: 1.0 if number == ROUNDS - 1 else 9.0)
    assert doubt(timed, checker) == ""


def test_the_fastest_prefill_and_the_quieter_steps_count(make: Any) -> None:
    for scenario in (PREFILL, DECODE):
        timed, checker = make(scenario, lambda number, index: 1.0 if index == 1 else 9.0)
        assert bool(doubt(timed, checker)) == (scenario is DECODE)


def test_on_the_host_cpu_time_must_say_the_same(make: Any) -> None:
    timed, checker = make(DECODE, lambda number, index: 9.0)
    timed.busy = False
    assert doubt(timed, checker) == ""


def test_the_slowest_rank_counts(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, checker = make(DECODE, lambda number, index: 9.0)
    step = timed.time_step
    monkeypatch.setattr(timed, "time_step", lambda index: step(index) and 1.0)
    assert doubt(timed, checker) == ""
    monkeypatch.setattr(timed.implementation, "slowest", lambda samples: [9.0 * one for one in samples])
    assert "nothing had seen take 9 ms" in doubt(timed, checker)


@pytest.mark.parametrize("scenario", [PREFILL, DECODE], ids=lambda one: one.name)
def test_what_others_keep_from_running_is_no_evidence(make: Any, scenario: Scenario) -> None:
    """It is judged all the same, and a few forwards that were let run are."""
    timed, checker = make(scenario, lambda number, index: 9.0)
    timed.share = lambda number, index: 0.3
    assert doubt(timed, checker) == ""
    timed.round, timed.share = -1, lambda number, index: 0.3 * (number not in (2, 4, 30))
    assert "as if results were remembered" in doubt(timed, checker)
    timed.round, timed.delayed = -1, None  # nobody counts
    assert "as if results were remembered" in doubt(timed, checker)


def test_outputs_are_judged_where_nothing_can_be_said_of_times(make: Any) -> None:
    timed, checker = make(DECODE, lambda number, index: 9.0, lambda out, index: out.mul_(1.01))
    timed.share = lambda number, index: 0.3
    assert doubt(timed, checker).startswith("outputs on inputs that nothing had seen are wrong: ")


def test_a_little_more_of_very_little_says_nothing(make: Any) -> None:
    timed, checker = make(DECODE, lambda number, index: 0.05)
    timed.samples.passes = [[0.01] * DECODE.steps]
    timed.passes[0].regions_cpu = 0.01
    assert doubt(timed, checker) == ""


def test_forwards_that_were_remembered_now_and_then_lower_the_average(make: Any) -> None:
    timed, checker = make(PREFILL, lambda number, index: 1.0)
    timed.samples.passes = [[1.0, 0.1, 1.0, 0.1]] * 2 + [[1.0] * 4]
    timed.steps = Steps(range(4), range(4), 3)
    assert doubt(timed, checker) == ""
    timed.samples.passes = [[1.0, 1.0, 0.01, 0.01], [1.0, 1.0, 0.01, 0.01], [1.0, 1.0, 1.0, 0.01]]
    timed.passes = [PassTimes(forwards=4, regions_cpu=sum(one)) for one in timed.samples.passes]
    assert ", on those of the passes 0.588 ms, " in doubt(timed, checker)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_outputs_are_judged(make: Any, scenario: Scenario) -> None:
    """In prefill, those of the fastest forward, which has no excuse."""
    last = 2 if scenario is PREFILL else min(scenario.steps, 8) - 1

    def spoil(out: torch.Tensor, index: int) -> None:
        if index == last:
            out[..., -1, :] *= 1.01

    timed, checker = make(scenario, lambda number, index: 1.0 - 0.01 * index, spoil)
    found = doubt(timed, checker)
    assert found.startswith("outputs on inputs that nothing had seen are wrong: "), found
    assert f" of {'forward' if scenario is PREFILL else 'step'} {last}" in found


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_every_row_is_new_and_the_scenarios_inputs_are_back_afterwards(make: Any, scenario: Scenario) -> None:
    timed, checker = make(scenario, lambda number, index: 9.0)
    one = timed.implementation
    one.restore(0)
    one.before(0)
    plain = one.x.clone()
    doubt(timed, checker)
    rows = torch.cat([plain, *timed.seen])
    assert len({tuple(row) for row in rows.abs().tolist()}) == len(rows)
    assert rows.std().item() == pytest.approx(1, abs=0.1)
    one.restore(0)
    one.before(0)
    assert torch.equal(one.x, plain)


def test_they_are_back_after_an_exception_too(make: Any) -> None:
    timed, checker = make(DECODE, lambda number, index: 1 / 0)
    one = timed.implementation
    one.restore(0)
    one.before(0)
    plain = one.x.clone()
    with pytest.raises(ZeroDivisionError):
        doubt(timed, checker)
    one.restore(0)
    one.before(0)
    assert torch.equal(one.x, plain)


def test_what_is_no_layer_is_not_asked() -> None:
    assert doubt(SimpleNamespace(implementation=object()), None) == ""  # type: ignore[arg-type]
