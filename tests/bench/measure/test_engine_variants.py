"""The engine's variants: timed next to the headline, interleaved with it and checked like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import pytest
from engine_bench import DECODE, PREFILL, Bench, Parrot, Wrong

from mla.bench.measure.variants import Variant, VariantError, Variants

if TYPE_CHECKING:
    from mla import MLAConfig

# All variants that need no graphs.
EAGER = Variants(
    (Variant(), Variant(cache="cold"), Variant(clock="device"), Variant(cache="cold", clock="device")),
)


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


def test_an_implementation_without_graphs_says_so(decode: Bench) -> None:
    variants = Variants((Variant(), Variant(mode="graph")))
    graph = decode.measure(decode.parrot("a"), variants=variants)["a"].others[0]
    assert (graph.check.status, graph.check.reason) == ("not run", "a is not captured")
    insisting = Variants(variants.timed, graphs_required=True)
    with pytest.raises(
        VariantError, match=r"--mode graph: d, a cannot be replayed from graphs: a is not captured\."
    ):
        decode.measure(decode.parrot("a"), variants=insisting)
