"""Medians, percentiles and intervals against brute force and the standard library."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla.bench.stats import median, median_interval, percentile

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


@pytest.mark.parametrize("n", range(6))
def test_fewer_than_six_values_have_no_95_percent_interval(n: int) -> None:
    assert median_interval([float(i) for i in range(n)]) is None


def test_six_values_span_from_the_least_to_the_greatest() -> None:
    assert median_interval([3, 1, 6, 2, 5, 4]) == (1, 6)


@pytest.mark.parametrize("n", range(6, 15))
def test_the_interval_is_the_narrowest_that_covers(n: int) -> None:
    """Each value lies above or below the true median with equal odds: count all 2^n ways."""
    below = [sum(sides) for sides in itertools.product((0, 1), repeat=n)]

    def coverage(k: int) -> float:
        """Odds that the median lies between the (k+1)-th smallest and the (k+1)-th greatest."""
        return sum(k < count < n - k for count in below) / 2**n

    found = median_interval(range(n))
    assert found is not None
    k = int(found[0])
    assert found == (k, n - 1 - k)
    assert coverage(k) >= 0.95 > coverage(k + 1)


@pytest.mark.parametrize("n", [6, 10, 31])
def test_simulated_intervals_contain_the_median_often_enough(n: int) -> None:
    draw = random.Random(n)
    hits = 0
    for _ in range(4000):
        interval = median_interval([draw.expovariate(1.0) for _ in range(n)])
        assert interval is not None
        hits += interval[0] <= math.log(2) <= interval[1]
    assert hits / 4000 > 0.94  # 0.95 less three standard errors


@given(values=NUMBERS, order=st.randoms())
def test_the_interval_contains_the_sample_median_whatever_the_order(
    values: list[float], order: random.Random
) -> None:
    interval = median_interval(values)
    shuffled = list(values)
    order.shuffle(shuffled)
    assert median_interval(shuffled) == interval
    if interval is not None:
        assert interval[0] <= median(values) <= interval[1]


@given(values=NUMBERS)
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    found = [percentile(values, percent) for percent in range(10, 100, 10)]
    assert found == pytest.approx(deciles, rel=1e-9, abs=1e-6)


@given(values=NUMBERS)
def test_the_extreme_percentiles_are_the_extreme_values(values: list[float]) -> None:
    assert (percentile(values, 0), percentile(values, 100)) == (min(values), max(values))
    assert percentile(values, 50) == pytest.approx(median(values), rel=1e-9, abs=1e-6)


def test_a_single_value_is_every_percentile() -> None:
    assert [percentile([2.5], percent) for percent in (0, 10, 50, 100)] == [2.5] * 4
