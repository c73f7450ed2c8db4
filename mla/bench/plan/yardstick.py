"""Fewer forwards for a yardstick that is much slower than what it is there to judge.

The first implementation of a run is the one in question; the others are what it is compared with. On a CPU
without bf16 a forward of the reference ops takes ten times as long as one of ours, and would take nearly all
of the run. Its passes stay as many as planned, so that intervals, turns, `--budget` and `--resume` mean what
they always do. What shrinks is where forwards are alike or secondary: the forwards of a prefill pass, and the
passes of its further variants. A decode pass always runs all of its steps, because its cache grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mla.bench.measure.variants import HEADLINE, Steps, Variant, steps
from mla.bench.workload.scenario import Scenario

# Seconds of timed passes that every implementation may take, however fast the first one is.
SECONDS = 20.0
# A yardstick that takes fewer times as long as the first implementation keeps all of its forwards.
MUCH = 2.0
# Passes that a further variant keeps. Two show whether they agree; an interval is only of the headline.
FEWEST = 2


def shortened(
    scenario: Scenario, variants: Sequence[Variant], ms: Mapping[str, float]
) -> dict[str, tuple[Mapping[Variant, Steps], str]]:
    """Return implementation -> what it runs instead of what is planned, and the clause that says so.

    `ms`: implementation -> milliseconds of one forward (a median of its warm-up), the first one first; an
    implementation that is not in it keeps what is planned. A yardstick's timed passes may take as long as
    those of the first implementation, and at least `SECONDS`.
    """
    planned = {variant: steps(variant, scenario) for variant in variants}
    found: dict[str, tuple[Mapping[Variant, Steps], str]] = {}
    for own in list(ms)[1:]:
        first = next(iter(ms))
        allowed = max(1e3 * SECONDS, _forwards(planned) * ms[first]) / ms[own]
        fewer = _fitting(planned, allowed, alike=scenario.mode == "prefill")
        if ms[own] >= MUCH * ms[first] and fewer != planned:
            found[own] = fewer, _reason(first, ms[own] / ms[first], planned, fewer)
    return found


def _forwards(plan: Mapping[Variant, Steps]) -> int:
    """Return the number of forwards in all timed passes."""
    return sum(one.passes * len(one.run) for one in plan.values())


def _fitting(planned: Mapping[Variant, Steps], allowed: float, alike: bool) -> dict[Variant, Steps]:
    """Return `allowed` of the planned forwards, or the fewest that are worth timing.

    The headline comes first, with its share; what it leaves is for the other variants.
    """
    headline = planned[HEADLINE]
    others = {variant: one for variant, one in planned.items() if variant != HEADLINE}
    if alike:  # forwards of one batch
        headline = _pass_of(headline, allowed / _forwards(planned))
    share = (allowed - headline.passes * len(headline.run)) / max(1, _forwards(others))
    return {HEADLINE: headline, **{name: _shorter(one, share, alike) for name, one in others.items()}}


def _pass_of(planned: Steps, share: float) -> Steps:
    """Return passes of fewer forwards."""
    some = range(max(1, math.floor(len(planned.run) * share)))
    return planned if share >= 1 else replace(planned, run=some, timed=some)


def _shorter(planned: Steps, share: float, alike: bool) -> Steps:
    """Return passes of fewer forwards, if these are alike, and then fewer passes."""
    fewer = _pass_of(planned, share) if alike else planned
    passes = planned.passes * share * len(planned.run) / len(fewer.run)
    return replace(fewer, passes=max(min(FEWEST, planned.passes), min(planned.passes, math.floor(passes))))


def _reason(
    first: str, ratio: float, planned: Mapping[Variant, Steps], fewer: Mapping[Variant, Steps]
) -> str:
    """Return, for example, "it takes 4 times as long as mla, so it has 2 instead of 10 forwards a pass"."""
    before, after = len(planned[HEADLINE].run), len(fewer[HEADLINE].run)
    said = [] if before == after else [f"{after} instead of {before} forwards a pass"]
    before, after = (
        sum(one.passes for variant, one in plan.items() if variant != HEADLINE) for plan in (planned, fewer)
    )
    said += [] if before == after else [f"{after} instead of {before} passes of its other timings"]
    return f"it takes {ratio:.2g} times as long as {first}, so it has {' and '.join(said)}"
