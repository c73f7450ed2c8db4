"""The model of a link: what it reads, what it costs, and the line that is fitted to measurements."""

from __future__ import annotations

import math

import pytest

from mla.errors import UsageError
from mla.parallel.layout import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, KINDS, Call, Line, Link, fit


@pytest.mark.parametrize(
    ("text", "alpha", "beta"),
    [
        ("alpha=5us,beta=300GB/s", 5e-6, 300e9),
        (" alpha=1.5ms , beta=2GiB/s", 1.5e-3, 2 * 2**30),
        ("alpha=0us,beta=infGB/s", 0.0, math.inf),
        ("ALPHA=20NS,BETA=1TB/S", 20e-9, 1e12),
    ],
)
def test_a_link_is_read_with_its_units(text: str, alpha: float, beta: float) -> None:
    link = Link.parse(text)
    assert [link.lines[kind] for kind in KINDS] == [Line(pytest.approx(alpha), pytest.approx(beta))] * 3


@pytest.mark.parametrize(
    "text",
    [
        *(
            "alpha=5us",
            "beta=3GB/s,alpha=5us",
            "alpha=5,beta=3GB/s",
            "alpha=5us,beta=3GB",
            "alpha=-5us,beta=3GB/s",
        ),
        *("alpha=5us,beta=0GB/s", "alpha=infus,beta=3GB/s", "alpha=1.2.3us,beta=3GB/s", "", "5us"),
    ],
)
def test_anything_else_is_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="a link is written as in 'alpha=5us,beta=300GB/s'"):
        Link.parse(text)


def test_kinds_may_differ_and_text_repeats_what_was_read() -> None:
    text = "all-reduce:alpha=5us,beta=3GB/s;all-gather:alpha=0us,beta=infGB/s"
    link = Link.parse(text)
    assert link.missing(KINDS) == ["all-to-all"]
    assert Link.parse(str(link)) == link
    assert str(Link.parse("alpha=5us,beta=3GB/s")) == "alpha=5us,beta=3GB/s"
    assert Link.parse("ideal").ideal
    assert Link.parse(str(Link({}))) == Link({})
    with pytest.raises(UsageError, match=r"unknown collective 'all-reduc'\. Did you mean 'all-reduce'"):
        Link.parse("all-reduc:alpha=5us,beta=3GB/s")


def test_collectives_cost_what_their_algorithms_send() -> None:
    """Of 4 ranks: a ring's all-reduce is its reduce-scatter and its all-gather, 3 messages each."""
    calls = [Call(ALL_REDUCE, 4, 1000), Call(ALL_GATHER, 4, 250), Call(ALL_TO_ALL, 4, 1000)]
    assert [(call.steps, call.sent) for call in calls] == [(6, 1500), (3, 750), (3, 750)]
    link = Link(dict.fromkeys(KINDS, Line(alpha=1.0, beta=10.0)))
    assert link.seconds(calls) == pytest.approx(6 + 150 + 3 + 75 + 3 + 75)
    assert Link({}).seconds(calls) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_fit_finds_the_line_it_was_measured_on(kind: str, ranks: int) -> None:
    true = Line(7e-6, 2.5e9)
    small, large = Call(kind, ranks, 32 << 10), Call(kind, ranks, 8 << 20)
    fitted = fit((small, true.seconds(small)), (large, true.seconds(large)))
    assert (fitted.alpha, fitted.beta) == (pytest.approx(true.alpha), pytest.approx(true.beta))


def test_noise_makes_no_negative_costs() -> None:
    small, large = Call(ALL_REDUCE, 2, 100), Call(ALL_REDUCE, 2, 10_000)
    assert fit((small, 2.0), (large, 1.0)) == Line(1.0, math.inf)
    steep = fit((small, 1e-9), (large, 1.0))
    assert steep.alpha == 0.0
    assert steep.beta > 0
    assert Link({ALL_GATHER: steep}).missing(KINDS) == ["all-reduce", "all-to-all"]
