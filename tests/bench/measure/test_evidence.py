"""Evidence against a time, on scripted milliseconds: late forwards, a clock, fresh inputs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mla
from mla.bench.measure import evidence
from mla.bench.measure.evidence import ROUNDS, TURNS, Unseen, device_doubt, fresh_doubt, late_doubt
from mla.bench.measure.passes import PassRunner, PassTimes
from mla.bench.measure.samples import Samples
from mla.bench.measure.variants import HEADLINE, Steps
from mla.bench.subjects.base import LayerChecker
from mla.bench.subjects.inputs import Inputs, make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check
from mla.weights import random_state_dict

if TYPE_CHECKING:
    from mla import MLAConfig

PREFILL = Scenario(name="p", mode="prefill", query_lens=(3, 2), history=(4, 0), runs=12, passes=3)
DECODE = Scenario(name="d", mode="decode", query_lens=(1, 1), history=(4, 3), runs=10)
SHORT = Scenario(name="s", mode="decode", query_lens=(1,), history=(5,), runs=2)
STACK = Scenario(name="l", mode="decode", query_lens=(1, 1), history=(4, 3), runs=3, layers=2)
SCENARIOS = [PREFILL, DECODE, SHORT, STACK]

Ms = Callable[[bool, int], float]  # of a forward, by whether its inputs are fresh and the number of the run


# ------------------------------------------------------------------------------------------ late forwards


def times(late: list[float], inside: float = 1.0) -> list[PassTimes]:
    return [PassTimes(inside=[inside] * len(late), late=late)]


@pytest.mark.parametrize(
    ("late", "inside"),
    [
        ([0.0] * 40, 1.0),
        ([0.14] * 40, 1.0),  # caches are colder after a forward
        ([0.04] * 40, 0.01),
        ([9.0] * 2, 1.0),  # too few to tell
        ([9.0] * 4 + [0.0] * 36, 1.0),  # a busy machine
        ([-5.0] * 40, 1.0),
    ],
)
def test_forwards_that_were_done_in_time(late: list[float], inside: float) -> None:
    assert late_doubt(times(late, inside)) == ""


@pytest.mark.parametrize("late", [[0.9] * 3, [0.9] * 40, [0.9] * 8 + [0.0] * 32])
def test_forwards_that_went_on_after_their_clock(late: list[float]) -> None:
    late_count = sum(ms > 0 for ms in late)
    assert late_doubt(times(late)) == (
        f"the device worked on for 0.9 ms after {late_count} of {len(late)} timed forwards of 1 ms, as if "
        "`synchronize` returned early"
    )


# --------------------------------------------------------------------------------------- a device's clock


class Clocks:
    """Forwards of 1 ms, the host's clock, and a device's that says `lie` of what it counted."""

    clock = "virtual"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lie: Callable[[float, int], float]) -> None:
        self.now, self.windows, self.steps, self._lie = 0.0, 0, 0, lie
        self.out = torch.ones(1)
        monkeypatch.setattr(evidence, "now_ns", lambda: int(self.now * 1e6))
        self.runner: Any = SimpleNamespace(
            timer=self, forwards=self, steps=Steps(range(4), range(4), 6), wait=lambda: None
        )
        self.runner.passes = [PassTimes(inside=[1.0] * 4)]

    def start(self) -> None:
        self.windows, self._start = self.windows + 1, self.now

    def stop(self) -> float:
        return self._lie(self.now - self._start, self.windows)

    def restore(self, number: int) -> None:
        self.now += 0.3

    def before(self, index: int) -> None:
        self.now += 0.1

    def step(self, index: int) -> None:
        self.now, self.steps = self.now + 1.0, self.steps + 1


@pytest.mark.parametrize(
    "lie",
    [
        lambda ms, window: ms,
        lambda ms, window: 0.92 * ms,
        lambda ms, window: ms - 0.4,
        lambda ms, window: ms if window == TURNS else 3 * ms,  # others had the CPUs
    ],
)
def test_a_device_clock_that_agrees_is_believed(monkeypatch: pytest.MonkeyPatch, lie: Any) -> None:
    clocks = Clocks(monkeypatch, lie)
    assert device_doubt(clocks.runner, count(), lambda: None) == ""
    assert clocks.steps >= 20, "a window is long enough for both clocks to be exact"


@pytest.mark.parametrize("factor", [0.1, 0.69, 0.85, 1.3, 10.0])
def test_a_device_clock_that_does_not_is_not(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    clocks = Clocks(monkeypatch, lambda ms, window: factor * ms)
    told = device_doubt(clocks.runner, count(), lambda: None)
    assert told.startswith("20 forwards take ")
    assert told.endswith(" ms by the host's")
    assert clocks.windows == TURNS


def test_outputs_that_are_not_there_end_a_window_when_the_timer_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stops(ms: float, window: int) -> float:
        clocks.now += 30.0  # the work is done only now
        return ms

    clocks = Clocks(monkeypatch, stops)
    clocks.out.fill_(torch.nan)
    assert "by the host's" in device_doubt(clocks.runner, count(), lambda: None)


# -------------------------------------------------------------------------------- inputs nothing has seen


class Scripted(PassRunner):
    """Runs a real layer, whose forwards take scripted times; `mutate` may spoil outputs."""

    takes: Ms = staticmethod(lambda fresh, number: 1.0)
    mutate: Any = staticmethod(lambda out, fresh: None)

    def __init__(self, layer: MlaLayer, scenario: Scenario) -> None:
        every = range(scenario.steps)
        samples = Samples(HEADLINE, Check(status="ok"), passes=[[1.0] * scenario.steps] * 3)
        steps = Steps(every, every, scenario.passes)
        super().__init__(layer, layer, lambda: None, None, None, steps, samples)
        self.runs: list[bool] = []  # whether its inputs were fresh
        self.seen: list[Inputs] = []
        self.unseen: Any = None

    def run(self, number: int, beat: Any, count: int | None = None) -> PassTimes:
        inputs = self.implementation._inputs  # type: ignore[attr-defined]
        self.runs.append(inputs.seed is not None)
        self.seen.append(inputs)
        return super().run(number, beat, count)

    def _region(self, index: int, taken: PassTimes, timer: Any) -> None:
        self.forwards.step(index)
        self.mutate(self.forwards.out, self.runs[-1])
        taken.samples.append(self.takes(self.runs[-1], len(self.runs)))


@pytest.fixture
def make(tiny: Callable[..., MLAConfig]) -> Any:
    """Return a maker of a runner and what asks it for evidence."""

    def make(scenario: Scenario, **changes: Any) -> tuple[Scripted, Callable[[], str]]:
        config, dtype = tiny(**changes), torch.float32
        backend = mla.load_backend("cpu", threads=1)
        setting = Setting(config, backend, dtype, "auto", 16, 0, layers=scenario.layers)
        state, inputs = random_state_dict(config, 0, dtype), make_inputs(config, scenario, 0, dtype)
        layer = MlaLayer(setting, state, "mla-reference", "reference")
        layer.load(scenario, inputs)
        checker = LayerChecker(config, state, inputs, dtype, lambda: checker.expected)
        runner = Scripted(layer, scenario)
        unseen = Unseen(inputs, checker, evidence.forwards(runner.steps, scenario.mode == "prefill"))
        runner.unseen = unseen

        def ask() -> str:
            told = fresh_doubt(runner, unseen, count(1), lambda: None)
            runner.run(0, lambda: None)
            assert not runner.runs.pop(), "the inputs of the passes are back"
            assert layer.check(checker).status == "ok" or runner.mutate is not Scripted.mutate
            return told

        return runner, ask

    return make


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"output_gate": "head"}])
def test_an_honest_layer_is_as_fast_and_right(make: Any, scenario: Scenario, changes: dict[str, Any]) -> None:
    runner, ask = make(scenario, **changes)
    runner.takes = lambda fresh, number: 1.4
    runner.implementation.restore(7)  # whatever turn came before
    assert ask() == ""
    assert runner.runs == [True]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_slow_on_new_inputs_alone_is_doubted(make: Any, scenario: Scenario) -> None:
    runner, ask = make(scenario)
    runner.takes = lambda fresh, number: 5.2 if fresh else 1.0
    assert ask() == (
        "forwards on fresh inputs take 5.2 ms, those of the passes 1 ms, as if results were remembered"
    )
    assert runner.runs == [True, False] * ROUNDS


def test_a_busy_machine_hides_no_gain(make: Any) -> None:
    runner, ask = make(PREFILL)
    runner.takes = lambda fresh, number: 9.0 + number if fresh or number % 3 == 0 else 1.0
    assert ask().startswith("forwards on fresh inputs take 10 ms, those of the passes 1 ms")


def test_every_round_has_inputs_of_its_own_history_included(make: Any) -> None:
    runner, ask = make(DECODE)
    runner.takes = lambda fresh, number: 5.2 if fresh else 1.0
    ask()
    fresh = [inputs for inputs in runner.seen if inputs.seed is not None]
    for what in (lambda inputs: inputs.hidden, lambda inputs: inputs.history[0][0]):
        seen = {what(inputs).numpy().tobytes() for inputs in [*fresh, runner.seen[-1]]}
        assert len(seen) == ROUNDS + 1


@pytest.mark.parametrize(
    "ms",
    [
        lambda fresh, number: 1.0 if number >= 2 * ROUNDS - 1 else 9.0 if fresh else 1.0,
        lambda fresh, number: 6.0,  # whatever the inputs: the machine is busy
        lambda fresh, number: 9.0 if fresh else 6.1,
        lambda fresh, number: 1.0 if number in (6, 14) else 9.0,  # rounds on the inputs of the passes
    ],
    ids=["one quiet round", "all slow", "nearly all", "quiet for the passes alone"],
)
@pytest.mark.parametrize("scenario", [PREFILL, DECODE], ids=lambda scenario: scenario.name)
def test_a_busy_machine_is_no_evidence(make: Any, scenario: Scenario, ms: Ms) -> None:
    runner, ask = make(scenario)
    runner.takes = ms
    assert ask() == ""


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_wrong_outputs_on_new_inputs_are_found(make: Any, scenario: Scenario) -> None:
    runner, ask = make(scenario)
    runner.mutate = lambda out, fresh: out.mul_(1.1) if fresh else None
    assert ask().startswith("outputs on fresh inputs are wrong: ")


def test_variants_and_implementations_share_inputs_and_one_oracle(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, ask = make(DECODE)
    monkeypatch.setattr("mla.bench.subjects.base.expected_plain", None)  # it ran when they were drawn
    assert (ask(), ask()) == ("", "")
    assert runner.seen[0] is runner.seen[2]


@pytest.mark.parametrize("spoiled", [True, False])
def test_inputs_that_contradicted_a_time_serve_nobody_else(make: Any, spoiled: bool) -> None:
    """Who remembers them, known or wrong, would be quick and right on them afterwards."""
    runner, ask = make(DECODE)
    before = runner.unseen.inputs
    if spoiled:
        runner.mutate = lambda out, fresh: out.mul_(1.1) if fresh else None
    else:
        runner.takes = lambda fresh, number: 5.2 if fresh else 1.0
    assert ask()
    drawn = runner.unseen.inputs
    assert drawn is not before
    assert not any(drawn is seen for seen in runner.seen)
