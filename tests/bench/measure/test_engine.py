"""The engine: order, completeness and honesty of timed passes, on a clock that only steps advance."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from engine_bench import CHECKED, DECODE, Bench, MakeBench, Parrot

from mla.bench.measure import engine, evidence, passes
from mla.bench.measure.engine import Hooks
from mla.bench.measure.passes import PassRunner
from mla.bench.measure.samples import WarmupResult
from mla.bench.measure.variants import HEADLINE, Steps, Variant, Variants
from mla.bench.subjects.inputs import Inputs
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check

# What reloads the caches before a pass.
REWARM = ["restore", "before", "step", "after"]


def test_every_sample_is_kept_in_the_order_it_was_taken(decode: Bench) -> None:
    result = decode.measure(decode.parrot("a"))["a"]
    assert result.passes == [[5, 6, 7], [9, 10, 11], [13, 14, 15], [17, 18, 19]]
    assert result.check.status == "ok"
    assert not result.interrupted


def test_a_prefill_spreads_its_runs_over_its_passes(prefill: Bench) -> None:
    assert prefill.measure(prefill.parrot("a"))["a"].passes == [[3, 4], [6, 7], [9, 10]]


def test_only_the_step_and_its_wait_lie_between_two_readings(decode: Bench) -> None:
    decode.measure(decode.parrot("a"), decode.parrot("b"))
    steps = 0
    for words in decode.timed():
        assert words[: len(REWARM)] == REWARM
        timed = words[len(REWARM) :]
        for place, what in enumerate(timed):
            if what == "step":
                steps += 1
                assert timed[place - 2 : place + 3] == ["before", "read", "step", "wait", "read"]
    assert steps == 2 * DECODE.passes * DECODE.runs


def test_outputs_are_collected_before_anything_else_is_called(decode: Bench) -> None:
    decode.measure(decode.parrot("a"))
    for words in decode.timed():
        assert words[-2:] == ["after", "outputs"]


def test_a_pass_after_another_implementation_is_flagged(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), seed=3)
    order = decode.order()
    switched = [name != last for name, last in zip(order, ["", *order], strict=False)]
    for name in ("a", "b"):
        assert measured[name].headline.after_switch == [
            s for s, who in zip(switched, order, strict=True) if who == name
        ]
    assert False in switched[1:], "choose a seed with two passes of one implementation in a row"


def test_no_two_timed_passes_have_the_same_inputs_and_all_implementations_have_the_same(
    decode: Bench,
) -> None:
    a, b = decode.parrot("a"), decode.parrot("b")
    decode.measure(a, b)
    timed = [sorted(number for number in parrot.numbers if number < CHECKED) for parrot in (a, b)]
    assert timed[0] == timed[1] == [1, 2, 3, 4]  # the forward before each has inputs of its own
    assert a.numbers[0] == b.numbers[0] == CHECKED
    others = [number for number in a.numbers if number > CHECKED]
    assert len(set(others)) == len(others)


def test_an_implementation_that_fails_its_check_is_never_timed(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("bad", wrong=lambda number: number == 0), decode.parrot("good"))
    assert measured["bad"].check.status == "wrong"
    assert measured["bad"].passes == []
    assert decode.order() == ["good"] * DECODE.passes
    assert len(measured["good"].passes) == DECODE.passes


@pytest.mark.parametrize("chosen", range(DECODE.passes))
def test_one_that_is_wrong_in_any_one_pass_loses_its_numbers(decode: Bench, chosen: int) -> None:
    """Each pass is two restores: of a forward to warm up again, and its own."""
    measured = decode.measure(decode.parrot("late", wrong=lambda number: number == 2 + 2 * chosen))
    assert measured["late"].check.status == "wrong"
    assert measured["late"].check.reason.startswith(f"right at first, wrong in pass {chosen + 1}: 6 of 6 ")
    assert measured["late"].passes == []


def test_a_failure_is_told_while_it_is_in_place_and_once(decode: Bench) -> None:
    told: list[tuple[str, str]] = []

    def failed(impl: Any, check: Check) -> None:
        told.append((impl.name, check.reason))
        assert decode.log[-1] == (impl.name, "passed")

    decode.measure(
        decode.parrot("late", wrong=lambda number: number > 1), decode.parrot("b"), hooks=Hooks(failed=failed)
    )
    assert [name for name, _ in told] == ["late"]
    assert told[0][1].startswith("right at first, wrong in pass 1: ")


def test_the_worst_of_all_checks_is_reported(decode: Bench) -> None:
    class Drifting(Parrot):
        def step(self, index: int) -> None:
            super().step(index)
            self._found[index] = self._found[index] * (1 + 2.5e-7 * (self.number == 6))

    exact = decode.measure(decode.parrot("a"))["a"].check
    drifted = decode.measure(Drifting(decode, "a"))["a"].check
    assert exact.error_ratio is not None
    assert drifted.error_ratio is not None
    assert exact.error_ratio < drifted.error_ratio <= 1


def test_an_interrupt_keeps_complete_passes_and_flags_all(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), _26=KeyboardInterrupt())
    kept = [samples for name in ("a", "b") for samples in measured[name].passes]
    assert len(kept) >= 4
    assert all(len(samples) == DECODE.runs for samples in kept)
    assert len(kept) == len(decode.order())
    assert all(measurement.interrupted for measurement in measured.values())
    assert measured["a"].device_state == [{"when": "before", "timed": "0"}]
    assert gc.isenabled()


def test_an_interrupt_while_loading_leaves_the_rest_not_run(decode: Bench) -> None:
    class Unloadable(Parrot):
        def load(self, scenario: Scenario, inputs: Inputs) -> None:
            raise KeyboardInterrupt

    measured = decode.measure(decode.parrot("a"), Unloadable(decode, "b"))
    assert [measured[name].check.status for name in ("a", "b")] == ["ok", "not run"]
    assert all(measurement.interrupted and not measurement.passes for measurement in measured.values())


def test_an_interrupt_keeps_what_another_clock_has_confirmed(
    decode: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm = evidence.device_doubt

    def interrupted(runner: PassRunner, *given: Any) -> str:
        if runner.timer is not None and runner.implementation.name == "b":
            raise KeyboardInterrupt
        return confirm(runner, *given)

    monkeypatch.setattr(evidence, "device_doubt", interrupted)
    variants = Variants((HEADLINE, Variant(clock="device")))
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), variants=variants)
    assert all(measurement.passes for measurement in measured.values())
    assert [len(measurement.others[0].passes) > 0 for measurement in measured.values()] == [True, False]


def test_an_interrupt_does_not_hide_why_something_was_not_run(decode: Bench) -> None:
    reasons = iter(["", "too little time", ""])

    def should_stop(seconds: float, what: str) -> str:
        if what == "another pass":
            raise KeyboardInterrupt
        return next(reasons) if what == "checks and one timed pass" else ""

    measured = decode.measure(*map(decode.parrot, "abc"), hooks=Hooks(should_stop=should_stop))
    assert measured["b"].check.reason == "too little time"


@pytest.mark.parametrize("where", ["oracle", "forwards"])
def test_memory_that_is_short_costs_evidence_and_no_number(
    decode: Bench, monkeypatch: pytest.MonkeyPatch, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*given: Any) -> Any:
        raise MemoryError

    checker: Any = decode.checker
    checker.of = short if where == "oracle" else lambda inputs, count: checker
    monkeypatch.setattr(evidence, "fresh_doubt", short)
    measured = decode.measure(decode.parrot("a"))
    assert len(measured["a"].passes) == DECODE.passes
    assert measured["a"].check.status == "ok"
    assert capsys.readouterr().err == "d: memory is short: times are not cross-checked on fresh inputs\n"
    assert [what for _, what in decode.log].count("load") == (1 if where == "oracle" else 2)


def test_the_garbage_collector_rests_in_every_forward_so_that_none_can_tell(decode: Bench) -> None:
    parrot = decode.parrot("a")
    decode.measure(parrot)
    assert len(parrot.collecting) >= DECODE.inputs + DECODE.passes * (1 + DECODE.runs)
    assert not any(parrot.collecting)
    assert gc.isenabled()


def test_the_garbage_collector_is_back_after_an_error(decode: Bench) -> None:
    with pytest.raises(RuntimeError, match="launch failed"):
        decode.measure(decode.parrot("a"), _4=RuntimeError("launch failed"))
    assert gc.isenabled()


def test_no_pass_starts_when_the_time_is_over_and_all_that_ran_are_checked(decode: Bench) -> None:
    answers = iter(["", "", "", "it is over"])
    hooks = Hooks(should_stop=lambda seconds, what: next(answers) if what == "another pass" else "")
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), hooks=hooks)
    assert sorted(len(measurement.passes) for measurement in measured.values()) == [1, 2]
    assert [measurement.check.status for measurement in measured.values()] == ["ok", "ok"]
    assert not any(measurement.interrupted for measurement in measured.values())


def test_a_first_pass_that_does_not_fit_leaves_the_others_theirs(decode: Bench) -> None:
    answers = iter(["too little time", *[""] * 3, "it is over"])
    hooks = Hooks(should_stop=lambda seconds, what: next(answers) if what == "another pass" else "")
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), hooks=hooks)
    assert sum(len(measurement.passes) for measurement in measured.values()) == 3


@pytest.mark.parametrize("short", [True, False])
def test_new_lengths_are_left_out_where_time_is_short(
    decode: Bench, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    begun: list[str] = []
    measure = evidence.on_new_lengths
    monkeypatch.setattr(
        evidence,
        "on_new_lengths",
        lambda impl, *given, **named: (begun.append(impl.name), measure(impl, *given, **named))[1],
    )
    hooks = Hooks(should_stop=lambda seconds, what: what if short and what == "new lengths" else "")
    assert decode.measure(decode.parrot("a"), hooks=hooks)["a"].passes
    assert begun == ([] if short else ["a"])


def test_a_variant_that_does_not_fit_is_not_checked_and_says_why(decode: Bench) -> None:
    hooks = Hooks(should_stop=lambda seconds, what: "too little time" if what == "its check" else "")
    measured = decode.measure(
        decode.parrot("a"), hooks=hooks, variants=Variants((HEADLINE, Variant(clock="device")))
    )
    assert measured["a"].passes
    assert [other.check.reason for other in measured["a"].others] == ["too little time"]


def test_the_engine_tells_who_runs_and_that_it_is_alive_outside_of_timed_regions(decode: Bench) -> None:
    log = decode.log
    hooks = Hooks(enter=lambda name: log.append((name, "enter")), heartbeat=lambda: log.append(("", "beat")))
    decode.measure(decode.parrot("a"), decode.parrot("b"), hooks=hooks)
    for words in decode.timed():
        assert words.count("beat") == DECODE.runs
        assert all(words[place - 1] == "after" for place, what in enumerate(words) if what == "beat")
    running = ""
    for name, what in log:
        running = name if what == "enter" else running
        assert what != "step" or name == running


def test_sensors_are_read_around_all_passes_and_never_between(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"))
    total = 2 * DECODE.passes
    state = [{"when": "before", "timed": "0"}, {"when": "after", "timed": str(total)}]
    assert [measured[name].device_state for name in "ab"] == [state, state]
    words = [what for _, what in decode.log if what in ("sense", "passed")]
    assert words == ["sense", *["passed"] * total, "sense"]


def test_warm_ups_are_timed_apart_and_restore_where_a_pass_ends(make_bench: MakeBench) -> None:
    bench = make_bench(msgspec.structs.replace(DECODE, warmups=7))
    result = bench.measure(bench.parrot("a"))["a"]
    assert result.warmup == WarmupResult(63, False)  # 1 + 2 + ... + 63 ms are more than 2 s
    words = [what for _, what in bench.log if what in ("restore", "step")]
    whole = ["restore", "step", "step", "step"]
    assert words[: 22 * 4] == whole * 22  # the last of them is checked


# ------------------------------------------------------------------------------------- slow yardsticks


@pytest.fixture
def cut(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measure two implementations, of which "slow" runs two passes of the first two of three steps."""
    bench = make_bench(msgspec.structs.replace(DECODE, warmups=1))
    said: list[str] = []
    monkeypatch.setattr(engine, "shortened", lambda *given: Steps(range(2), range(2), 2))
    monkeypatch.setattr(engine, "detail", said.append)
    variants = Variants((HEADLINE, Variant(cache="cold")))
    slow = bench.parrot("slow")
    measured = bench.measure(bench.parrot("fast"), slow, variants=variants)
    return SimpleNamespace(bench=bench, measured=measured, said=said, slow=slow)


def test_a_slow_yardstick_is_asked_for_as_soon_as_it_is_warm(cut: Any) -> None:
    assert cut.said == ["d, slow: too slow for all; running 2 passes of 2 instead of 4 passes of 3"]


def test_none_is_held_to_what_was_wrong(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(msgspec.structs.replace(DECODE, warmups=1))
    monkeypatch.setattr(engine, "shortened", lambda *given: pytest.fail("it was asked for"))
    measured = bench.measure(bench.parrot("bad", lambda number: True), bench.parrot("other"))
    assert len(measured["other"].passes) == DECODE.passes


def test_it_runs_the_headline_alone_in_passes_as_short_as_they_were_cut_to(cut: Any) -> None:
    fast, slow = cut.measured["fast"], cut.measured["slow"]
    assert [len(samples) for samples in slow.passes] == [2, 2]
    assert [len(samples) for samples in fast.passes] == [3] * 4
    assert (slow.others, slow.due) == ([], 2)
    assert ([len(other.passes) for other in fast.others], fast.due) == ([4], None)


def test_its_check_is_as_short_and_all_of_its_outputs_are_checked(cut: Any) -> None:
    words = [what for who, what in cut.bench.log if who == "slow" and what in ("restore", "step", "outputs")]
    assert words[: words.index("outputs")][-3:] == ["restore", "step", "step"]
    assert sorted(cut.measured["slow"].outputs) == [0, 1]


def test_long_forwards_do_without_one_that_reloads_the_caches(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest forward of the warm-up takes a millisecond."""
    monkeypatch.setattr(passes, "LONG_MS", 1.0)
    bench = make_bench(msgspec.structs.replace(DECODE, warmups=1))
    bench.measure(bench.parrot("a"))
    for words in bench.timed():
        assert words.count("restore") == 1
        assert words.count("step") == DECODE.runs
