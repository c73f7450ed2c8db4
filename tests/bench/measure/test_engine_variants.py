"""The engine's variants: timed next to the headline, interleaved with it and checked like it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from engine_bench import CHECKED, DECODE, PREFILL, Bench, MakeBench, Parrot, Wrong

from mla.bench.measure import evidence
from mla.bench.measure.variants import Variant, VariantError, Variants

# All variants that need no graphs.
EAGER = Variants(
    (Variant(), Variant(cache="cold"), Variant(clock="device"), Variant(cache="cold", clock="device"))
)
COLD = Variants((Variant(), Variant(cache="cold")))


def test_further_variants_are_timed_beside_the_headline(decode: Bench) -> None:
    result = decode.measure(decode.parrot("a"), variants=EAGER)["a"]
    assert [str(sample.variant) for sample in result.samples] == [
        "eager, warm cache, host clock",
        "eager, cold cache, host clock",
        "eager, warm cache, device clock",
        "eager, cold cache, device clock",
    ]
    taken = [sample for variant in result.samples for samples in variant.passes for sample in samples]
    assert len(set(taken)) == len(taken) == 4 * DECODE.passes * DECODE.runs
    assert {variant.check.status for variant in result.samples} == {"ok"}
    assert [variant.clock for variant in result.samples] == ["host", "host", "virtual", "virtual"]


def test_variants_alternate_by_pass_in_the_order_of_the_seed(make_bench: MakeBench) -> None:
    def firsts(seed: int) -> list[list[float]]:
        bench = make_bench(DECODE)
        measured = bench.measure(bench.parrot("a"), bench.parrot("b"), seed=seed, variants=EAGER)
        return [
            [samples[0] for samples in sample.passes] for name in "ab" for sample in measured[name].samples
        ]

    for seed in range(3):
        first_samples = firsts(seed)
        order = sorted(first for variant in first_samples for first in variant)
        rounds = [[order.index(first) // 8 for first in variant] for variant in first_samples]
        assert rounds == [list(range(DECODE.passes))] * 8, "each variant has one pass in every round"
    assert firsts(0) == firsts(0)
    assert firsts(0) != firsts(1)


def test_every_variant_has_inputs_of_its_own(decode: Bench) -> None:
    a, b = decode.parrot("a"), decode.parrot("b")
    decode.measure(a, b, variants=EAGER)
    timed = [Counter(number for number in parrot.numbers if number < CHECKED) for parrot in (a, b)]
    assert timed[0] == timed[1] == Counter(range(1, 4 * DECODE.passes + 1))


def test_nothing_of_the_backend_is_called_between_a_flush_and_the_clock(
    decode: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(self: object) -> None:
        decode.log.append(("", "flush"))

    monkeypatch.setattr("mla.bench.measure.passes.CacheFlush.__call__", flush)
    decode.measure(decode.parrot("a"), variants=COLD)
    words = [what for _, what in decode.log]
    places = [place for place, what in enumerate(words) if what == "flush"]
    assert len(places) == (DECODE.passes + 1) * DECODE.runs
    for place in places:
        assert words[place - 1 : place + 3] == ["before", "flush", "read", "step"]


def test_a_warm_pass_begins_with_an_untimed_forward_and_a_cold_one_does_not(decode: Bench) -> None:
    measured = decode.measure(decode.parrot("a"), variants=COLD)["a"]
    steps = [words.count("step") for words in decode.timed()]
    assert steps.count(DECODE.runs + 1) == steps.count(DECODE.runs) == DECODE.passes
    assert any(measured.headline.after_switch)


def test_extra_variants_of_a_long_run_have_six_passes_spread_over_it(make_bench: MakeBench) -> None:
    bench = make_bench(msgspec.structs.replace(PREFILL, runs=100, passes=10))
    result = bench.measure(bench.parrot("a"), variants=COLD)["a"]
    headline, cold = result.samples
    assert [len(samples) for samples in headline.passes] == [10] * 10
    assert [len(samples) for samples in cold.passes] == [5] * 6
    firsts = [samples[0] for samples in cold.passes]
    ends = [samples[-1] for samples in headline.passes]
    before = [sum(end < first for end in ends) for first in firsts]
    rounds = [1, 3, 4, 6, 8, 9]
    assert all(number <= count <= number + 1 for number, count in zip(rounds, before, strict=True))


def test_a_cold_decode_pass_times_some_steps_and_checks_all(make_bench: MakeBench) -> None:
    bench = make_bench(msgspec.structs.replace(DECODE, runs=40, passes=6))
    parrot = bench.parrot("a")
    cold = bench.measure(parrot, variants=COLD)["a"].others[0]
    assert [len(samples) for samples in cold.passes] == [10] * 6
    assert "every 4th step of a pass timed" in cold.method
    assert cold.check.status == "ok"


class Spoilt(Parrot):
    """Wrong in the passes of the cold variants, which it knows by the flush before a step."""

    flushed = False

    def step(self, index: int) -> None:
        flushed, Spoilt.flushed = Spoilt.flushed, False
        self._wrong = lambda number: flushed and self._when(number)
        super().step(index)

    _when: Wrong = staticmethod(lambda number: True)


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(self: object) -> None:
        Spoilt.flushed = True

    monkeypatch.setattr("mla.bench.measure.passes.CacheFlush.__call__", flush)


@pytest.mark.usefixtures("flushes")
def test_a_variant_that_is_wrong_before_timing_costs_the_case_its_numbers(decode: Bench) -> None:
    measured = decode.measure(Spoilt(decode, "a"), decode.parrot("b"), variants=EAGER)
    assert measured["a"].check.status == "wrong"
    assert measured["a"].check.reason.startswith("eager, cold cache, host clock: ")
    assert not any(sample.passes for sample in measured["a"].samples)
    assert all(len(sample.passes) == DECODE.passes for sample in measured["b"].samples)


@pytest.mark.usefixtures("flushes")
def test_a_variant_that_goes_wrong_while_it_is_timed_costs_the_case_its_numbers(decode: Bench) -> None:
    class Late(Spoilt):
        _when = staticmethod(lambda number: number > 8)  # after the passes that are checked before timing

    measured = decode.measure(Late(decode, "a"), decode.parrot("b"), variants=EAGER)
    assert "cold cache" in measured["a"].check.reason
    assert ": right at first, wrong in pass " in measured["a"].check.reason
    assert not any(sample.passes for sample in measured["a"].samples)
    assert all(len(sample.passes) == DECODE.passes for sample in measured["b"].samples)


def test_every_variant_has_evidence_of_its_own_the_headline_first(
    decode: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def doubts(runner: Any, *others: Any) -> list[str]:
        asked.append((runner.implementation.name, str(runner.samples.variant)))
        return (
            ["it looks wrong"]
            if runner.samples.clock == "virtual" and runner.implementation.name == "b"
            else []
        )

    monkeypatch.setattr(evidence, "doubts", doubts)
    measured = decode.measure(decode.parrot("a"), decode.parrot("b"), variants=EAGER)
    assert len(set(asked)) == 4 + 3
    assert asked[0] == ("a", "eager, warm cache, host clock")
    assert measured["a"].check.status == "ok"
    assert measured["b"].check.reason == "eager, warm cache, device clock: it looks wrong"
    assert not any(sample.passes for sample in measured["b"].samples)


def test_an_implementation_without_graphs_says_so(decode: Bench) -> None:
    variants = Variants((Variant(), Variant(mode="graph")))
    graph = decode.measure(decode.parrot("a"), variants=variants)["a"].others[0]
    assert (graph.check.status, graph.check.reason) == ("not run", "a is not captured")
    insisting = Variants(variants.timed, graphs_required=True)
    with pytest.raises(
        VariantError, match=r"--mode graph: d, a cannot be replayed from graphs: a is not captured\."
    ):
        decode.measure(decode.parrot("a"), variants=insisting)
