"""Statistics of timed passes: medians with distribution-free confidence intervals, nothing dropped.

Steps of one pass are autocorrelated, so the unit of confidence is the pass: the interval is for the median
over passes. Source: order statistics, e.g. H. A. David and H. N. Nagaraja, *Order Statistics*, section 7.1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the narrowest symmetric order-statistic interval of the median with at least `confidence`.

    None when there are too few values for it (fewer than 6 at 95 %).
    """
    ordered, n = sorted(values), len(values)
    best = None
    outside = 0.0
    for k in range(n // 2):  # the interval from the (k+1)-th smallest to the (k+1)-th largest
        outside += 2 * math.comb(n, k) / 2**n
        if 1 - outside < confidence:
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


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value."""
    return statistics.median(values)


def drift(medians: Sequence[float]) -> float | None:
    """Return the relative change over all passes: Theil-Sen slope of their medians, times their number.

    Half of the passes but one may be disturbed without moving it much. None below 3 passes.
    """
    n = len(medians)
    if n < 3:
        return None
    slopes = [(medians[j] - medians[i]) / (j - i) for i in range(n) for j in range(i + 1, n)]
    middle = median(medians)
    return n * median(slopes) / middle if middle > 0 else None


def outliers(passes: Sequence[Sequence[float]]) -> int | None:
    """Count the samples far slower than was to be expected; None below 3 passes of equal length.

    Expected is the median of the sample's step over all passes (a growing cache is no outlier), times, for
    passes of at least 3 samples, the median ratio by which its pass differs (nor is a machine that drifts or
    throttles). Far is a ratio to that of more than 1 plus 5 robust standard deviations (1.4826 times the
    median absolute deviation), and of more than 1.1, or a quiet machine would answer for each microsecond.
    """
    if len(passes) < 3 or len({len(samples) for samples in passes}) != 1:
        return None
    steps = [median(step) for step in zip(*passes, strict=True)]
    ratios = [
        [sample / step if step else 1.0 for sample, step in zip(one, steps, strict=True)] for one in passes
    ]
    levels = [median(one) if len(one) >= 3 else 1.0 for one in ratios]
    away = [ratio / level - 1 for one, level in zip(ratios, levels, strict=True) for ratio in one if level]
    spread = 1.4826 * median([abs(value) for value in away])
    return sum(value > max(5 * spread, 0.1) for value in away)
