"""Judge a case by the device's limits: a number far above them is withheld, whoever measured wrongly."""

from __future__ import annotations

import time
from collections.abc import Callable

from mla.bench.limits.roofline import MAX_TIMES, RooflineModel
from mla.bench.results.schema import Case, Cost, Roofline
from mla.verify.verdict import Check

# Seconds for which limits are measured again after the cases of a scenario.
SECONDS = 0.5
# A case far above its limit: waits before the limit is measured again, in full, for about AGAIN seconds each
# time. Another load may have slowed it down, and a load comes and goes in seconds.
PAUSES, AGAIN = (0.3, 1.0, 2.0), 5.0


def judge(case: Case, least: Cost, ceilings: RooflineModel, beat: Callable[[], None] = lambda: None) -> None:
    """Withhold the number of a case that is far above its limit; `least` is the work of a whole forward.

    `beat` is called between measurements, which may take seconds.
    """
    if case.latency_ms is None:
        return
    milliseconds = case.layers * case.latency_ms.median
    if ceilings.roofline(least, milliseconds).doubt:
        ceilings.again(AGAIN, MAX_TIMES, anew=True)
    for pause in PAUSES:
        if not ceilings.implausible(least, milliseconds):
            return
        beat()
        time.sleep(pause)
        beat()
        ceilings.again(AGAIN, MAX_TIMES, anew=True)
    if reason := ceilings.implausible(least, milliseconds):
        withhold(case, reason)


def withhold(case: Case, reason: str) -> None:
    """Take the numbers from a case that are in doubt; what its check found otherwise stays."""
    case.check = doubtful(case.check, reason)
    case.latency_ms = case.tokens_per_s = case.plan_ms = case.launch_bound = case.new_lengths = None
    case.roofline, case.stages, case.switch_steps, case.passes = Roofline(), [], [], 0
    case.spread = None
    for timing in case.timings:
        if timing.latency_ms is not None:
            timing.check, timing.latency_ms, timing.passes = doubtful(timing.check, reason), None, 0


def doubtful(check: Check, reason: str) -> Check:
    """Return the check of a number that is withheld."""
    return Check(
        status="doubtful",
        error_ratio=check.error_ratio,
        relative_error=check.relative_error,
        reason=reason,
    )
