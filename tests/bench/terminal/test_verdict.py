"""Which is said to be fastest: from intervals, never from a yardstick or a number that failed its check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mla.bench import results
from mla.bench.terminal.digits import limit
from mla.bench.terminal.verdict import is_yardstick, verdicts
from mla.verify.verdict import Check

Make = Callable[..., results.Case]


def timed(case: Make, name: str, low: float, high: float, **changes: Any) -> results.Case:
    """Return a case whose median lies in the middle of its interval."""
    middle = (low + high) / 2
    latency = results.Latency(median=middle, ci95=(low, high), p10=low, p90=high, samples=[middle] * 6)
    return case(**{"implementation": name, "latency_ms": latency, "ops": {"linear": name}, **changes})


def failed(case: Make, name: str, status: Any, **changes: Any) -> results.Case:
    check = Check(status=status, reason="because")
    return case(implementation=name, check=check, latency_ms=None, tokens_per_s=None, **changes)


@pytest.fixture
def said(make_run: Any) -> Callable[..., list[str]]:
    """Return the verdicts of a run with the given cases, as text."""

    def said(*cases: results.Case) -> list[str]:
        run = make_run()
        run.cases = list(cases)
        return list(map(str, verdicts(run)))

    return said


LIMIT = results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory")


def test_the_fastest_wins_by_the_ratio_of_the_medians_and_is_held_against_its_limit(
    said: Any, case: Make
) -> None:
    slow, fast = timed(case, "slow", 2.9, 3.1), timed(case, "fast", 0.98, 1.02, roofline=LIMIT)
    assert said(slow, fast) == [
        "prefill: fast is 3.0x as fast as slow (2.8 .. 3.2), at 50 % of the memory limit"
    ]


@pytest.mark.parametrize(
    ("bounds", "decided"), [((1.03, 1.1), True), ((1.02, 1.1), False), ((0.9, 1.3), False)]
)
def test_intervals_that_touch_or_overlap_decide_nothing(
    said: Any, case: Make, bounds: tuple[float, float], decided: bool
) -> None:
    (text,) = said(timed(case, "a", 0.98, 1.02), timed(case, "b", *bounds))
    assert ("a is " in text) is decided
    assert ("no decision between a and b" in text) is not decided


def test_those_that_tie_are_named_and_so_is_the_next(said: Any, case: Make) -> None:
    three = [timed(case, name, 0.9, 1.1 + place / 10) for place, name in enumerate("abc")]
    (text,) = said(timed(case, "z", 1.9, 2.1), *three)
    assert text.startswith("prefill: no decision between a, b and c: their intervals overlap; slower: z, ")


def test_too_few_passes_decide_nothing(said: Any, case: Make) -> None:
    first, other = case(implementation="a"), case(implementation="b", ops={"linear": "b"})
    assert other.latency_ms is not None
    other.latency_ms = results.Latency(median=20.0, ci95=None, p10=20, p90=20, samples=[20.0])
    (text,) = said(first, other)
    assert "no decision between a and b: too few passes for an interval (6 are needed), " in text


def test_the_same_ops_decide_nothing(said: Any, case: Make) -> None:
    pair = [timed(case, name, low, low + 0.1, ops={"linear": "x"}) for name, low in (("a", 1.0), ("b", 2.0))]
    assert "no decision between a and b: they run the same ops" in said(*pair)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"check": Check(status="not run", reason="only reads memory")},
        {"cost": results.Cost(flops=0, bytes=1)},
    ],
)
def test_a_yardstick_does_not_take_part(said: Any, case: Make, changes: dict[str, Any]) -> None:
    yardstick = timed(case, "read", 0.001, 0.002, **changes)
    assert is_yardstick(yardstick)
    (text,) = said(timed(case, "a", 1, 1.1), timed(case, "b", 2, 2.1), yardstick)
    assert "a is 2.0x as fast as b" in text
    assert "read" not in text


@pytest.mark.parametrize("status", ["wrong", "doubtful", "not run"])
def test_a_case_without_a_number_never_wins_and_is_named(said: Any, case: Make, status: str) -> None:
    (text,) = said(failed(case, "mla", status), timed(case, "b", 2, 2.1))
    assert text == f"prefill: only b has a number: 2.05 ms, no limit known; no number: mla ({status})"
    assert said(failed(case, "mla", status)) == [f"prefill: no number: mla ({status})"]


def test_a_number_that_failed_its_check_never_wins(said: Any, case: Make) -> None:
    odd = timed(case, "odd", 0.1, 0.2, check=Check(status="wrong"))
    (text,) = said(timed(case, "a", 1, 1.1), timed(case, "b", 2, 2.1), odd)
    assert "a is " in text
    assert "no number: odd (wrong)" in text


def test_a_share_in_doubt_is_no_percentage(said: Any, case: Make) -> None:
    doubt = results.Roofline(floor_ms=2.0, bound="memory", doubt="faster than its floor")
    (text,) = said(timed(case, "a", 1, 1.1, roofline=doubt), timed(case, "b", 2, 2.1))
    assert text.startswith("prefill: a is 2.0x as fast as b")
    assert text.endswith(", but its limit or its time is suspect")
    assert "%" not in text
    assert limit(doubt) == ">100? mem"


def test_a_sweep_is_one_verdict_that_counts_its_points(said: Any, case: Make) -> None:
    cases = []
    for kv in range(50):
        point = {"scenario": f"sweep {kv}", "base": "sweep", "point": {"kv": kv}, "roofline": LIMIT}
        high = 1.1 if kv < 42 else 2.5
        cases += [timed(case, "a", 1.0, high, **point), timed(case, "b", 2.0, 2.2, **point)]
    cases[0] = failed(case, "a", "wrong", scenario="sweep 0", base="sweep", point={"kv": 0})
    for fast in (cases[2], cases[4]):
        fast.roofline = results.Roofline(floor_ms=2.0, bound="memory", doubt="faster than its floor")
        fast.latency_ms = timed(case, "a", 0.1, 0.11).latency_ms
    assert said(*cases) == [
        "sweep (50 points): a is fastest at 39, no decision at 8, suspect limit or time at 2, only one has a "
        "number at 1; 2x as fast as the next; at 50 % of the limit; cases without a number: 1 wrong"
    ]


def test_a_sweep_of_one_implementation_has_no_winner(said: Any, case: Make) -> None:
    points = [timed(case, "a", 1, 1.1, scenario=f"s{kv}", base="s", point={"kv": kv}) for kv in (1, 2)]
    assert said(*points) == ["s (2 points): only a has numbers"]


def test_a_sweep_of_one_point_is_a_scenario(said: Any, case: Make) -> None:
    point = {"scenario": "s kv=1", "base": "s", "point": {"kv": 1}, "roofline": LIMIT}
    cases = [timed(case, "a", 1, 1.1, **point), timed(case, "b", 2, 2.2, **point)]
    (text,) = said(*cases)
    assert text.startswith("s kv=1: a is 2.0x as fast as b")
