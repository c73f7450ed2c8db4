"""Medians, percentiles and intervals against brute force and the standard library."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla.bench.results.stats import drift, median, median_interval, outliers, percentile

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


def test_six_values_span_from_the_least_to_the_greatest_and_fewer_have_no_interval() -> None:
    assert median_interval([3, 1, 6, 2, 5, 4]) == (1, 6)
    assert [median_interval(range(n)) for n in range(6)] == [None] * 6


@pytest.mark.parametrize("n", range(6, 15))
def test_the_interval_is_the_narrowest_that_covers(n: int) -> None:
    """Each value lies above or below the true median with equal odds: count all 2^n ways."""
    below = [sum(sides) for sides in itertools.product((0, 1), repeat=n)]

    def coverage(k: int) -> float:
        """Odds that the median lies between the (k+1)-th smallest and the (k+1)-th greatest."""
        return sum(k < count < n - k for count in below) / 2**n

    interval = median_interval(range(n))
    assert interval is not None
    k = int(interval[0])
    assert interval == (k, n - 1 - k)
    assert coverage(k) >= 0.95 > coverage(k + 1)


def test_a_hundred_thousand_values_have_an_interval() -> None:
    """Within two ranks of the normal approximation; no binomial coefficient of such numbers is made."""
    n = 100_000
    interval = median_interval(range(n))
    assert interval is not None
    assert interval[0] == pytest.approx(n / 2 - 1.96 * math.sqrt(n) / 2, abs=2)
    assert interval[1] == n - 1 - interval[0]


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
    percentiles = [percentile(values, percent) for percent in range(10, 100, 10)]
    assert percentiles == pytest.approx(deciles, rel=1e-9, abs=1e-6)


def test_drift_of_very_many_passes_is_that_of_groups() -> None:
    n = 50_000
    assert drift([1 + 0.5 * i / n for i in range(n)]) == pytest.approx(0.5 / 1.25, rel=0.01)


def test_drift_is_the_change_over_all_passes_of_which_it_needs_three() -> None:
    assert [drift([1.0] * n) for n in range(4)] == [None, None, None, 0]
    assert drift([1.0, 1.1, 1.2, 1.3, 1.4]) == pytest.approx(5 * 0.1 / 1.2)
    assert drift([2.0, 1.5, 1.0]) == pytest.approx(-1.0)


@given(st.floats(-0.05, 0.05), st.integers(0, 9), st.floats(0.1, 100))
def test_one_disturbed_pass_hardly_moves_the_drift(slope: float, place: int, disturbed: float) -> None:
    medians = [1 + slope * i for i in range(10)]
    clean = drift(medians)
    medians[place] = disturbed
    drifted = drift(medians)
    assert clean is not None
    assert drifted is not None
    assert drifted == pytest.approx(clean, abs=0.25 * abs(clean) + 1e-9)


def noisy_passes(seed: int = 0, passes: int = 6, steps: int = 100) -> list[list[float]]:
    draw = random.Random(seed)
    return [[1 + 0.002 * step + draw.gauss(0, 0.01) for step in range(steps)] for _ in range(passes)]


def test_a_growing_cache_gives_no_outliers() -> None:
    assert outliers(noisy_passes()) == 0
    assert outliers([[1.0, 2.0, 3.0, 40.0]] * 6) == 0


def test_giants_are_counted_one_by_one_wherever_they_are() -> None:
    passes = noisy_passes()
    passes[0][0] += 0.5
    assert outliers(passes) == 1
    passes[3][99] += 1000
    passes[5][50] += 0.4
    assert outliers(passes) == 3


def test_a_slow_pass_and_a_drift_are_no_outliers() -> None:
    passes = noisy_passes()
    assert (
        outliers([[sample * (1 + 0.1 * place) for sample in samples] for place, samples in enumerate(passes)])
        == 0
    )
    assert outliers([*passes[:5], [3 * sample for sample in passes[5]]]) == 0


def test_a_giant_that_is_a_whole_pass_is_counted() -> None:
    """A prefill of one forward per pass: there is nothing to tell the pass by."""
    assert outliers([[1.0], [1.01], [0.99], [1.0], [1.02], [5.0]]) == 1


def test_what_is_slower_by_less_than_a_tenth_is_no_outlier_on_a_quiet_machine() -> None:
    passes = [[1.0] * 4 for _ in range(6)]
    passes[2][1] = 1.09
    assert outliers(passes) == 0
    passes[2][1] = 1.11
    assert outliers(passes) == 1


def test_too_few_passes_have_no_outliers_that_could_be_told() -> None:
    assert outliers([[1.0, 100.0], [1.0, 1.0]]) is None
    assert outliers([]) is None
