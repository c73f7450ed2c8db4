"""How many digits of a number are printed: as many as its interval supports.

The last printed digit is at the largest power of ten that does not exceed half the 95 % interval, within 2
to 6 significant digits. So rounding moves a number by at most a quarter of its interval: a number known to
4 % shows 2 or 3 digits, one known to 0.1 % shows 4.
"""

from __future__ import annotations

import math

from mla.bench.results.schema import Interval, Latency, Roofline, Throughput

# Fewest and most significant digits, whatever the interval.
MIN_DIGITS, MAX_DIGITS = 2, 6
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6))


def number(value: float | None) -> str:
    """Return a number without an interval, with 3 digits or more: all before the point; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def known(value: float | None, interval: Interval | None) -> str:
    """Return `value` with the digits that its `interval` supports; as `number` without one."""
    if value is None:
        return "-"
    place = _place(value, interval)
    return number(value) if place is None else _rounded(value, place)


def estimated(estimate: Latency | Throughput | None) -> str:
    """Return a median with the digits that its interval supports; "-" for None."""
    return known(estimate.median, estimate.ci95) if estimate else "-"


def percent(share: float | None) -> str:
    """Return a share in percent; "-" if it is not known."""
    return "-" if share is None else f"{100 * share:.0f} %"


def per_second(rate: float | None, unit: str) -> str:
    """Return a rate of `unit`, such as "FLOP/s", with the prefix that leaves 1 to 999; "-" for None."""
    if rate is None:
        return "-"
    prefix, factor = next((prefix for prefix in _PREFIXES if rate >= prefix[1]), _PREFIXES[-1])
    return f"{rate / factor:.3g} {prefix}{unit}"


def limit(roofline: Roofline) -> str:
    """Return the share of the limit and its kind, such as "71 mem"; ">100?" where that is in doubt."""
    kind = (roofline.bound or "")[:3]
    if roofline.doubt:
        return f">100? {kind}".strip()
    return f"{100 * roofline.fraction:.0f} {kind}".strip() if roofline.fraction is not None else "-"


def between(values: Interval | None, value: float | None, interval: Interval | None) -> str:
    """Return "low .. high", rounded to the same place as `value` with its `interval`."""
    if values is None:
        return "-"
    place = None if value is None else _place(value, interval)
    low, high = (number(end) if place is None else _rounded(end, _own(end, place)) for end in values)
    return f"{low} .. {high}"


def unreliable(value: float, interval: Interval | None) -> bool:
    """Return whether an interval is wider than the number that it is about."""
    return interval is not None and interval[1] - interval[0] > value


def quoted(value: float, interval: Interval | None, unit: str) -> str:
    """Return "value unit" as a sentence or a headline says it; one that is not known is no number."""
    if unreliable(value, interval):
        return f"unreliable ({between(interval, value, interval)} {unit})"
    return f"{known(value, interval)} {unit}"


def _place(value: float, interval: Interval | None) -> int | None:
    """Return the exponent of the last digit to print; None without a usable interval."""
    half = (interval[1] - interval[0]) / 2 if interval is not None else 0.0
    if not (half > 0 and value > 0 and math.isfinite(half) and math.isfinite(value)):
        return None
    leading = math.floor(math.log10(value))
    place = math.floor(math.log10(half * (1 + 1e-9)))  # so that 0.001 is not rounded down a place
    return min(max(place, leading - MAX_DIGITS + 1), leading - MIN_DIGITS + 1)


def _own(end: float, place: int) -> int:
    """Return the place for one end of an interval: what is not 0 keeps a digit."""
    return min(place, math.floor(math.log10(end))) if end > 0 else place


def _rounded(value: float, place: int) -> str:
    return f"{round(value, -place):.{max(0, -place)}f}"
