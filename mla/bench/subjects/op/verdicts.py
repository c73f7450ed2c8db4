"""One verdict on the calls of a pass."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from mla.verify.verdict import Check

# So many wrong calls are named.
NAMED = 3


def summary(checks: Mapping[int, Check], damage: str = "") -> Check:
    """Return the verdict on a pass, given those on its calls by index. `damage`: a fault of the pass.

    The reason is that of the first wrong call.
    """
    wrong = [index for index, one in checks.items() if one.status != "ok"]
    reasons = [damage] * bool(damage)
    if wrong:
        reasons.append(f"{checks[wrong[0]].reason} ({_named(wrong)}; {len(wrong)} of {len(checks)} checked)")
    ratios = [one.error_ratio for one in checks.values() if one.error_ratio is not None]
    squares = [one.relative_error**2 for one in checks.values() if one.relative_error is not None]
    return Check(
        status="wrong" if reasons else "ok",
        error_ratio=max(ratios) if len(ratios) == len(checks) else None,
        relative_error=statistics.fmean(squares) ** 0.5 if len(squares) == len(checks) else None,
        reason="; ".join(reasons),
    )


def _named(wrong: list[int]) -> str:
    """Return, for example, "calls 1, 4, 7, .. of the pass": the first call is 1."""
    numbers = ", ".join(str(index + 1) for index in wrong[:NAMED])
    return f"call{'s' * (len(wrong) > 1)} {numbers}{', ..' * (len(wrong) > NAMED)} of the pass"
