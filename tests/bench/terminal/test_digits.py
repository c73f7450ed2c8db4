"""Printed digits follow the interval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla.bench.terminal.digits import between, known, number


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [
        (1.0123, 0.04, "1.01"),  # 4 %
        (25.31, 1.0, "25"),
        (9.87, 0.4, "9.9"),
        (1.0123, 0.001, "1.012"),  # 0.1 %
        (99.94, 0.09994, "99.94"),
        (2.0, 0.002, "2.000"),
        (15544.2, 200, "15500"),
        (15544.2, 3, "15544"),
        (15544.2, 0.3, "15544.2"),
        (0.01234, 0.00002, "0.01234"),
        (5.0, 50, "5.0"),  # it is known badly: two digits all the same
        (1.23456789, 1e-9, "1.23457"),  # and six at most
        (1.0, 0.0, "1"),  # no doubt, no rule
    ],
)
def test_examples(value: float, half: float, expected: str) -> None:
    assert known(value, (value - half, value + half)) == expected


def test_without_an_interval_three_digits() -> None:
    assert known(1.23456, None) == number(1.23456) == "1.23"
    assert known(None, (1, 2)) == number(None) == "-"
    assert between(None, 1.0, (0, 2)) == "-"
    assert between((1.23456, 2.0), None, None) == "1.23 .. 2"


def test_ends_are_printed_to_the_place_of_the_value() -> None:
    interval = (24.83, 26.04)
    assert between(interval, 25.0, interval) == "24.8 .. 26.0"
    assert between((24.6, 101.23), 25.0, interval) == "24.6 .. 101.2"


@pytest.mark.parametrize(
    ("ends", "value", "expected"),
    [
        ((1.0, 276.0), 69.0, "1 .. 276"),
        ((1.56, 350.0), 180.0, "2 .. 350"),
        ((0.04, 240.0), 120.0, "0.04 .. 240"),
    ],
)
def test_the_noise_rounds_no_time_to_0(ends: tuple[float, float], value: float, expected: str) -> None:
    assert between(ends, value, ends) == expected


@given(low=st.floats(1e-9, 1e6), width=st.floats(0, 1e7), share=st.floats(0, 1))
def test_what_is_not_0_is_never_printed_as_0(low: float, width: float, share: float) -> None:
    ends = (low, low + width)
    for end in between(ends, low + share * width, ends).split(" .. "):
        assert float(end) > 0


VALUES = st.floats(1e-5, 1e7)


@given(value=VALUES, doubt=st.floats(1e-5, 0.4))
def test_rounding_hides_at_most_a_quarter_of_the_interval(value: float, doubt: float) -> None:
    half = value * doubt
    text = known(value, (value - half, value + half))
    assert abs(float(text) - value) <= half / 2 * (1 + 1e-6)
    assert "e" not in text


@given(value=VALUES, doubts=st.tuples(st.floats(1e-5, 0.4), st.floats(1e-5, 0.4)))
def test_less_doubt_never_shows_fewer_digits(value: float, doubts: tuple[float, float]) -> None:
    small, large = sorted(doubts)
    texts = [known(value, (value * (1 - d), value * (1 + d))) for d in (small, large)]
    decimals = [len(text.partition(".")[2]) for text in texts]
    assert decimals[0] >= decimals[1]
