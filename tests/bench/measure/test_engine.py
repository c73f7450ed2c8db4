"""The engine: order, completeness and honesty of timed passes, on a clock that does not run."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from mla.bench.measure.engine import measure
from mla.bench.measure.hooks import Hooks
from mla.bench.measure.samples import Measurement
from mla.bench.measure.variants import Variant, VariantError, Variants
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.inputs import Inputs, make_inputs
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_check import Checker
from mla_backends.testing import HostBackend

if TYPE_CHECKING:
    from mla import MLAConfig

Log = list[tuple[str, str]]
Wrong = Callable[[int], bool]

DECODE = Scenario(name="d", mode="decode", query_lens=(1, 1), history=(2, 3), runs=3, passes=4, warmups=0)
PREFILL = Scenario(name="p", mode="prefill", query_lens=(2,), history=(0,), runs=6, passes=3, warmups=0)
# All variants that need no graphs.
EAGER = Variants(
    (Variant(), Variant(cache="cold"), Variant(clock="device"), Variant(cache="cold", clock="device")),
)


class Parrot(Implementation):
    """Repeats the expected outputs, except in the passes that `wrong` picks (0 is the check)."""

    def __init__(self, name: str, expected: torch.Tensor, log: Log, wrong: Wrong = lambda number: False):
        self.name = name
        self._expected, self._log, self._wrong = expected, log, wrong
        self.number = 0  # restores so far
        self.collecting: list[bool] = []
        self.clean: list[bool] = []

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self._log.append((self.name, "load"))
        self.outputs = torch.full(self._expected.shape, torch.nan)

    def restore(self) -> None:
        self._log.append((self.name, "restore"))
        self.number += 1

    def before(self, index: int) -> None:
        self._log.append((self.name, "before"))

    def step(self, index: int) -> None:
        self._log.append((self.name, "step"))
        self.collecting.append(gc.isenabled())
        self.clean.append(bool(self.outputs.isnan().all()))
        slot = index % len(self._expected)
        self.outputs[slot] = self._expected[slot] * (2.0 if self._wrong(self.number) else 1.0)

    def cache_bytes(self) -> int:
        return 0

    def weight_bytes(self) -> int:
        return 0


class Clock:
    """Returns 0, 1, 2, ... milliseconds; `at` maps a sample's number to what happens then."""

    clock = "virtual"

    def __init__(self, log: Log, at: dict[int, BaseException] | None = None) -> None:
        self._log, self._at = log, at or {}
        self._numbers: Iterator[int] = itertools.count()
        self.taken = 0

    def note(self, what: str) -> None:
        self._log.append(("clock", what))

    def start(self) -> None:
        self._log.append(("clock", "start"))

    def stop(self) -> float:
        number = next(self._numbers)
        self.taken = number + 1
        self._log.append(("clock", "stop"))
        if number in self._at:
            raise self._at[number]
        return float(number)


class Stage(HostBackend):
    """A backend whose timers are all one clock, so that samples number the forwards in their order."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(cache_bytes=1)
        self.clock = clock

    def synchronize(self) -> None:
        self.clock.note("wait")

    def timer(self) -> Clock:
        return self.clock

    def device_timer(self) -> Clock:
        return self.clock

    def sensors(self) -> dict[str, str]:
        self.clock.note("sense")
        return {"timed": str(self.clock.taken)}


class Bench:
    """Everything `measure` needs for one scenario."""

    def __init__(self, config: MLAConfig, scenario: Scenario) -> None:
        self.scenario = scenario
        self.inputs = make_inputs(config, scenario, 0, torch.float32)
        self.expected = torch.randn(self.inputs.hidden.shape, generator=torch.Generator().manual_seed(0))
        self.log: Log = []
        self.checker = Checker(self.expected.double(), torch.float32, lambda: self.expected)

    def parrot(self, name: str, wrong: Wrong = lambda number: False) -> Parrot:
        return Parrot(name, self.expected, self.log, wrong)

    def measure(
        self,
        *parrots: Parrot,
        seed: int = 0,
        variants: Variants | None = None,
        hooks: Hooks = Hooks(),  # noqa: B008
        **at: Any,
    ) -> dict[str, Measurement]:
        clock = Clock(self.log, {int(key[1:]): error for key, error in at.items()})
        stage = Stage(clock)
        return measure(
            parrots,
            self.scenario,
            self.inputs,
            self.checker,
            stage,
            seed,
            variants,
            lambda what, done: None,
            hooks,
        )

    def order(self) -> list[str]:
        """Name whose pass each run of timed steps belongs to, in the order they ran."""
        timed = [
            name for (name, what), last in zip(self.log[1:], self.log, strict=False) if last[1] == "start"
        ]
        assert len(timed) % self.scenario.steps == 0
        return timed[:: self.scenario.steps]


@pytest.fixture
def decode(tiny: Callable[..., MLAConfig]) -> Bench:
    return Bench(tiny(), DECODE)


@pytest.fixture
def prefill(tiny: Callable[..., MLAConfig]) -> Bench:
    return Bench(tiny(), PREFILL)


def test_every_sample_is_kept_in_the_order_it_was_taken(decode: Bench) -> None:
    result = decode.measure(decode.parrot("a"))["a"]
    assert result.passes == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert result.check.status == "ok"
    assert not result.interrupted


def test_a_prefill_spreads_its_runs_over_its_passes(prefill: Bench) -> None:
    assert prefill.measure(prefill.parrot("a"))["a"].passes == [[0, 1], [2, 3], [4, 5]]


def test_only_the_step_lies_between_start_and_stop(decode: Bench) -> None:
    decode.measure(decode.parrot("a"), decode.parrot("b"))
    words = [what for _, what in decode.log]
    starts = [place for place, what in enumerate(words) if what == "start"]
    assert len(starts) == 2 * DECODE.passes * DECODE.runs
    assert all(words[place - 1 : place + 3] == ["before", "start", "step", "stop"] for place in starts)


def test_each_round_runs_every_implementation_once(decode: Bench) -> None:
    decode.measure(decode.parrot("a"), decode.parrot("b"), decode.parrot("c"))
    order = decode.order()
    rounds = [order[first : first + 3] for first in range(0, len(order), 3)]
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * DECODE.passes


def test_the_order_within_rounds_follows_the_seed(tiny: Callable[..., MLAConfig]) -> None:
    def order(seed: int) -> tuple[str, ...]:
        bench = Bench(tiny(), DECODE)
        bench.measure(bench.parrot("a"), bench.parrot("b"), seed=seed)
        return tuple(bench.order())

    orders = [order(seed) for seed in range(8)]
    assert orders == [order(seed) for seed in range(8)]
    assert len(set(orders)) > 1


def test_a_pass_after_another_implementation_is_flagged(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), seed=3)
    order = decode.order()
    switched = [name != last for name, last in zip(order, ["", *order], strict=False)]
    for name in ("a", "b"):
        assert measured[name].headline.after_switch == [
            s for s, who in zip(switched, order, strict=True) if who == name
        ]
    assert False in switched[1:], "choose a seed with two passes of one implementation in a row"


def test_every_pass_starts_from_restored_history_and_empty_outputs(decode: Bench) -> None:
    parrot = decode.parrot("a")
    decode.measure(parrot)
    words = [what for _, what in decode.log]
    firsts = [place for place, what in enumerate(words) if what == "start"][:: DECODE.runs]
    assert all(words[place - 2] == "restore" for place in firsts)
    timed = parrot.clean[-DECODE.passes * DECODE.runs :]
    assert timed == [True, False, False] * DECODE.passes


def test_an_implementation_that_fails_its_check_is_never_timed(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("bad", wrong=lambda number: number == 0), decode.parrot("good"))
    assert measured["bad"].check.status == "wrong"
    assert measured["bad"].passes == []
    assert decode.order() == ["good"] * DECODE.passes
    assert len(measured["good"].passes) == DECODE.passes


def test_one_that_is_wrong_after_timing_loses_its_numbers(decode: Bench) -> None:
    passes = DECODE.passes  # the check restores nothing, each pass does, and once more after another's
    measured = decode.measure(decode.parrot("late", wrong=lambda number: number > passes), decode.parrot("b"))
    assert measured["late"].check.status == "wrong"
    assert measured["late"].check.reason.startswith("correct before timing, wrong after it: ")
    assert measured["late"].passes == []
    assert len(measured["b"].passes) == DECODE.passes


def test_the_worse_of_both_checks_is_reported(decode: Bench) -> None:
    class Drifting(Parrot):
        def step(self, index: int) -> None:
            super().step(index)
            self.outputs[index % 3] *= 1 + 2.5e-7 * (self.number > 0)

    exact = decode.measure(decode.parrot("a"))["a"].check
    drifted = decode.measure(Drifting("a", decode.expected, decode.log))["a"].check
    assert exact.error_ratio is not None
    assert drifted.error_ratio is not None
    assert exact.error_ratio < drifted.error_ratio <= 1


def test_an_interrupt_keeps_complete_passes_and_flags_all(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), _16=KeyboardInterrupt())
    kept = [samples for name in ("a", "b") for samples in measured[name].passes]
    assert sorted(kept) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert all(one.interrupted for one in measured.values())
    assert gc.isenabled()


def test_an_interrupt_while_loading_leaves_the_rest_not_run(decode: Bench) -> None:
    class Unloadable(Parrot):
        def load(self, scenario: Scenario, inputs: Inputs) -> None:
            raise KeyboardInterrupt

    measured = decode.measure(decode.parrot("a"), Unloadable("b", decode.expected, decode.log))
    assert [measured[name].check.status for name in ("a", "b")] == ["ok", "not run"]
    assert all(one.interrupted and not one.passes for one in measured.values())


def test_an_interrupt_during_the_last_check_keeps_the_passes(
    decode: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = decode.checker.check

    def interrupted(outputs: torch.Tensor, ours: bool) -> Any:
        if ("clock", "stop") in decode.log:
            raise KeyboardInterrupt
        return check(outputs, ours)

    monkeypatch.setattr(decode.checker, "check", interrupted)
    result = decode.measure(decode.parrot("a"))["a"]
    assert len(result.passes) == DECODE.passes
    assert result.interrupted


def test_the_garbage_collector_rests_while_timing_only(decode: Bench) -> None:
    parrot = decode.parrot("a")
    decode.measure(parrot)
    timed = DECODE.passes * DECODE.runs
    assert not any(parrot.collecting[-timed:])
    assert all(parrot.collecting[: DECODE.inputs])
    assert gc.isenabled()


def test_the_garbage_collector_is_back_after_an_error(decode: Bench) -> None:
    with pytest.raises(RuntimeError, match="launch failed"):
        decode.measure(decode.parrot("a"), _4=RuntimeError("launch failed"))
    assert gc.isenabled()


def test_no_pass_starts_when_the_time_is_over_and_the_others_are_checked(decode: Bench) -> None:
    answers = iter([False, False, False, True])
    measured = decode.measure(
        decode.parrot("a"), decode.parrot("b"), hooks=Hooks(should_stop=lambda: next(answers))
    )
    assert sorted(len(one.passes) for one in measured.values()) == [1, 2]
    assert [one.check.status for one in measured.values()] == ["ok", "ok"]
    assert not any(one.interrupted for one in measured.values())


def test_the_engine_tells_who_runs_and_that_it_is_alive_outside_of_timed_regions(decode: Bench) -> None:
    log = decode.log
    hooks = Hooks(enter=lambda name: log.append((name, "enter")), heartbeat=lambda: log.append(("", "beat")))
    decode.measure(decode.parrot("a"), decode.parrot("b"), hooks=hooks)
    words = [what for _, what in log]
    assert words.count("beat") == 2 * DECODE.passes * DECODE.runs
    assert all(words[place - 1] == "stop" for place, what in enumerate(words) if what == "beat")
    running = ""
    for name, what in log:
        running = name if what == "enter" else running
        assert what != "step" or name == running


# ------------------------------------------------------------------------------------------- variants


def test_further_variants_are_timed_beside_the_headline(decode: Bench) -> None:
    result = decode.measure(decode.parrot("a"), variants=EAGER)["a"]
    assert [str(one.variant) for one in result.samples] == [
        "eager, warm cache, host clock",
        "eager, cold cache, host clock",
        "eager, warm cache, device clock",
        "eager, cold cache, device clock",
    ]
    taken = sorted(sample for one in result.samples for samples in one.passes for sample in samples)
    assert taken == list(range(4 * DECODE.passes * DECODE.runs))
    assert {one.check.status for one in result.samples} == {"ok"}


def test_variants_alternate_by_pass_in_the_order_of_the_seed(tiny: Callable[..., MLAConfig]) -> None:
    def firsts(seed: int) -> list[list[float]]:
        bench = Bench(tiny(), DECODE)
        found = bench.measure(bench.parrot("a"), bench.parrot("b"), seed=seed, variants=EAGER)
        return [[samples[0] for samples in one.passes] for name in "ab" for one in found[name].samples]

    per_round = 8 * DECODE.runs
    for seed in range(3):
        rounds = [[first // per_round for first in variant] for variant in firsts(seed)]
        assert rounds == [list(range(DECODE.passes))] * 8, "each variant has one pass in every round"
    assert firsts(0) == firsts(0)
    assert firsts(0) != firsts(1)


def test_a_cold_forward_follows_a_flush_that_has_finished(decode: Bench) -> None:
    decode.measure(decode.parrot("a"), variants=Variants((Variant(), Variant(cache="cold"))))
    words = [what for _, what in decode.log]
    starts = [place for place, what in enumerate(words) if what == "start"]
    flushed = [words[place - 2 : place] == ["before", "wait"] for place in starts]
    assert flushed.count(True) == flushed.count(False) == DECODE.passes * DECODE.runs


def test_a_warm_pass_after_another_variant_begins_with_an_untimed_forward(decode: Bench) -> None:
    decode.measure(
        decode.parrot("a"), decode.parrot("b"), variants=Variants((Variant(), Variant(cache="cold")))
    )
    events = [(name, what) for name, what in decode.log if what in ("restore", "step", "start", "wait")]
    for place, (name, what) in enumerate(events):
        if what == "restore" and events[place + 1 : place + 3] == [("clock", "start"), (name, "step")]:
            before = events[place - 2 : place]
            again = events[place - 1][0] == name and events[place - 2][1] == "start"
            assert again or before == [(name, "restore"), (name, "step")]


def test_extra_variants_of_a_long_run_have_six_passes_spread_over_it(tiny: Callable[..., MLAConfig]) -> None:
    bench = Bench(tiny(), msgspec.structs.replace(PREFILL, runs=100, passes=10))
    result = bench.measure(bench.parrot("a"), variants=Variants((Variant(), Variant(cache="cold"))))["a"]
    headline, cold = result.samples
    assert [len(samples) for samples in headline.passes] == [10] * 10
    assert [len(samples) for samples in cold.passes] == [5] * 6
    firsts = [samples[0] for samples in cold.passes]
    ends = [samples[-1] for samples in headline.passes]
    before = [sum(end < first for end in ends) for first in firsts]
    rounds = [1, 3, 4, 6, 8, 9]
    assert all(one <= count <= one + 1 for one, count in zip(rounds, before, strict=True))


def test_a_cold_decode_pass_times_some_steps_and_checks_all(tiny: Callable[..., MLAConfig]) -> None:
    scenario = msgspec.structs.replace(DECODE, runs=40, passes=6)
    bench = Bench(tiny(), scenario)
    parrot = bench.parrot("a")
    cold = bench.measure(parrot, variants=Variants((Variant(), Variant(cache="cold"))))["a"].others[0]
    assert [len(samples) for samples in cold.passes] == [10] * 6
    assert "every 4th step of a pass timed" in cold.method
    assert cold.check.status == "ok"


class Spoilt(Parrot):
    """Wrong whenever the clock's last word before its step was a wait: only with cold caches."""

    def step(self, index: int) -> None:
        flushed = self._log[-1] == ("clock", "wait") or self._log[-2:-1] == [("clock", "wait")]
        self._wrong = lambda number: flushed and self._when(number)
        super().step(index)

    _when: Wrong = staticmethod(lambda number: True)


def test_a_variant_that_is_wrong_before_timing_costs_the_case_its_numbers(decode: Bench) -> None:
    spoilt = Spoilt("a", decode.expected, decode.log)
    measured = decode.measure(spoilt, decode.parrot("b"), variants=EAGER)
    assert measured["a"].check.status == "wrong"
    assert measured["a"].check.reason.startswith(
        "eager, cold cache, host clock: 6 of 6 output rows are too far"
    )
    assert not any(one.passes for one in measured["a"].samples)
    assert all(len(one.passes) == DECODE.passes for one in measured["b"].samples)


def test_a_variant_that_goes_wrong_while_it_is_timed_costs_the_case_its_numbers(decode: Bench) -> None:
    class Late(Spoilt):
        _when = staticmethod(lambda number: number > 8)  # after the passes that are checked before timing

    late = Late("a", decode.expected, decode.log)
    measured = decode.measure(late, decode.parrot("b"), variants=EAGER)
    assert "cold cache" in measured["a"].check.reason
    assert ": correct before timing, wrong after it: " in measured["a"].check.reason
    assert not any(one.passes for one in measured["a"].samples)
    assert all(len(one.passes) == DECODE.passes for one in measured["b"].samples)


def test_sensors_are_read_around_all_passes_and_never_between(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"))
    total = 2 * DECODE.passes * DECODE.runs
    state = [{"when": "before", "timed": "0"}, {"when": "after", "timed": str(total)}]
    assert [measured[name].device_state for name in "ab"] == [state, state]
    words = [what for _, what in decode.log if what in ("sense", "start")]
    assert words == ["sense", *["start"] * total, "sense"]


def test_an_implementation_without_graphs_says_so(decode: Bench) -> None:
    variants = Variants((Variant(), Variant(mode="graph")))
    graph = decode.measure(decode.parrot("a"), variants=variants)["a"].others[0]
    assert (graph.check.status, graph.check.reason) == ("not run", "a is not captured")
    insisting = Variants(variants.timed, graphs_required=True)
    with pytest.raises(
        VariantError, match=r"--mode graph: d, a cannot be replayed from graphs: a is not captured\."
    ):
        decode.measure(decode.parrot("a"), variants=insisting)


def test_warm_ups_have_a_clock_of_their_own_and_restore_where_a_pass_ends(
    tiny: Callable[..., MLAConfig],
) -> None:
    bench = Bench(tiny(), msgspec.structs.replace(DECODE, warmups=7))
    result = bench.measure(bench.parrot("a"))["a"]
    assert (result.warmups, result.settled) == (101, False)  # 0 + 1 + ... + 100 ms are more than 5 s
    words = [what for _, what in bench.log if what in ("restore", "step")][DECODE.inputs :]
    assert words[:135] == [*["restore", "step", "step", "step"] * 34][:135]
