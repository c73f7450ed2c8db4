"""The engine: order, completeness and honesty of timed passes, on a clock that does not run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from engine_bench import DECODE, Bench, Parrot

from mla.bench.measure.hooks import Hooks
from mla.bench.subjects.inputs import Inputs
from mla.bench.workload.scenario import Scenario

if TYPE_CHECKING:
    from mla import MLAConfig


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


def test_sensors_are_read_around_all_passes_and_never_between(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"))
    total = 2 * DECODE.passes * DECODE.runs
    state = [{"when": "before", "timed": "0"}, {"when": "after", "timed": str(total)}]
    assert [measured[name].device_state for name in "ab"] == [state, state]
    words = [what for _, what in decode.log if what in ("sense", "start")]
    assert words == ["sense", *["start"] * total, "sense"]


def test_warm_ups_have_a_clock_of_their_own_and_restore_where_a_pass_ends(
    tiny: Callable[..., MLAConfig],
) -> None:
    bench = Bench(tiny(), msgspec.structs.replace(DECODE, warmups=7))
    result = bench.measure(bench.parrot("a"))["a"]
    assert (result.warmups, result.settled) == (101, False)  # 0 + 1 + ... + 100 ms are more than 5 s
    words = [what for _, what in bench.log if what in ("restore", "step")][DECODE.inputs :]
    assert words[:135] == [*["restore", "step", "step", "step"] * 34][:135]
