"""Statistics of timed passes: medians with distribution-free confidence intervals; no sample is dropped.

Steps of one pass are autocorrelated, so the unit of confidence is the pass: the interval is that of the
median over passes. Source: order statistics, e.g. H. A. David and H. N. Nagaraja, *Order Statistics*,
section 7.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import lgamma
from statistics import median as median

LOG_2 = math.log(2)
CONFIDENCE = 0.95  # at least, of an interval
MOST_SLOPES = 100_000  # of pairs of passes; there may be 100,000 passes


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the narrowest symmetric order-statistic interval of the median with at least 95 % confidence.

    None if there are fewer than 6 values.
    """
    ordered, n = sorted(values), len(values)
    best = None
    outside = 0.0
    for k in range(n // 2):  # the interval from the (k+1)-th smallest to the (k+1)-th largest
        outside += 2 * math.exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * LOG_2)
        if 1 - outside < CONFIDENCE:
            break
        best = (ordered[k], ordered[n - 1 - k])
    return best


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the linearly interpolated percentile of at least one value."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def drift(medians: Sequence[float]) -> float | None:
    """Return the relative change over all passes: Theil-Sen slope of their medians, times their number.

    Half of the passes but one may be disturbed without moving it much. Of very many passes, groups of
    successive ones stand for themselves by their median. None below 3 passes.
    """
    group = math.ceil(len(medians) / math.isqrt(2 * MOST_SLOPES))
    if group > 1:
        medians = [median(medians[i : i + group]) for i in range(0, len(medians) - group + 1, group)]
    n = len(medians)
    if n < 3:
        return None
    slopes = [(medians[j] - medians[i]) / (j - i) for i in range(n) for j in range(i + 1, n)]
    middle = median(medians)
    return n * median(slopes) / middle if middle > 0 else None


def outliers(passes: Sequence[Sequence[float]]) -> int | None:
    """Return the number of samples far slower than expected; None below 3 passes of equal length.

    A sample is expected to take the median of its step over all passes (so a growing cache makes no outliers)
    times, in passes of at least 3 samples, the median ratio by which its pass differs (so drifting and
    throttling make none either). It is an outlier if its ratio to that exceeds both 1 plus 5 robust standard
    deviations (1.4826 times the median absolute deviation) and 1.1, so that microseconds do not count on a
    quiet machine.
    """
    if len(passes) < 3 or len({len(samples) for samples in passes}) != 1:
        return None
    steps = [median(step) for step in zip(*passes, strict=True)]
    ratios = [
        [sample / step if step else 1.0 for sample, step in zip(samples, steps, strict=True)]
        for samples in passes
    ]
    levels = [median(row) if len(row) >= 3 else 1.0 for row in ratios]
    excess = [ratio / level - 1 for row, level in zip(ratios, levels, strict=True) for ratio in row if level]
    spread = 1.4826 * median([abs(value) for value in excess])
    return sum(value > max(5 * spread, 0.1) for value in excess)
