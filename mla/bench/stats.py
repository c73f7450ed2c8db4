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
