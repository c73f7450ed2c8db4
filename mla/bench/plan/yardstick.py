"""Fewer and shorter passes for a yardstick that is much slower than what it is there to judge.

The first implementation of a run is the one in question; the others are what it is compared with. On a CPU
without bf16 instructions a forward of the reference ops takes ten times as long as one of ours, and would
take nearly all of the run. Such a yardstick is timed in the headline's way alone. Its passes become fewer,
but never too few for an interval, and then shorter: fewer of the forwards of a prefill, which are alike, or
the first steps of a decode. The cache grows in those, so ratios are formed from the same steps of both
(`mla.bench.results.cases`). Any other implementation than the first runs less for lack of time as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mla.bench.measure.variants import EXTRA_PASSES, HEADLINE, Steps, Variant, steps
from mla.bench.results.cases import MIN_SHARED_STEPS
from mla.bench.workload.scenario import Scenario, spoken

# Seconds beyond which a yardstick is cut, or a share of what the first implementation takes; and the part of
# them that its timed passes may take then.
BASELINE_S, SHARE, LEFT = 5.0, 0.25, 0.6
# Seconds beyond which a baseline is cut that nobody asked for, however fast it is.
ADDED_S = 2.5
# Forwards beside the timed ones: checks, warm-ups, evidence.
EXTRA_FORWARDS = 60
# A yardstick that takes fewer times as long as the first implementation keeps all of its forwards.
MUCH_SLOWER = 2.0
# Passes that are left at least, enough for an interval, and steps of a decode pass: its cache grows, and
# ratios leave out the first one.
MIN_PASSES, MIN_STEPS = EXTRA_PASSES, MIN_SHARED_STEPS


def shortened(
    scenario: Scenario,
    variants: Sequence[Variant],
    ms: Mapping[str, float],
    most: float = math.inf,
    added: Sequence[str] = (),
) -> dict[str, tuple[Steps, str]]:
    """Return implementation -> what it runs, in the headline's way alone, and the clause that says so.

    `ms`: implementation -> milliseconds of one forward in its warm-up, the first one first; an implementation
    that is not in it keeps what is planned. So does one whose forwards take no more than `BASELINE_S` in all,
    or `SHARE` of those of the first implementation, or which cannot run less; unless time allows only for
    `most` forwards of the headline. Those `added` to what was asked for get `ADDED_S`, slow or not.
    """
    shorter: dict[str, tuple[Steps, str]] = {}
    counts = [steps(variant, scenario) for variant in variants]
    planned = EXTRA_FORWARDS + sum(count.passes * len(count.run) for count in counts)
    for name in list(ms)[1:]:
        first = next(iter(ms))
        if not ms[name]:
            continue
        allowed = math.inf
        if name in added:
            allowed = 1e3 * ADDED_S / ms[name]
        elif ms[name] >= MUCH_SLOWER * ms[first]:
            allowed = max(1e3 * BASELINE_S, SHARE * planned * ms[first]) / ms[name]
        whole, has_variants = steps(HEADLINE, scenario), len(variants) > 1
        cut = planned > allowed
        enough = LEFT * allowed if cut else math.inf
        fewer = _fitting(scenario, min(most, enough))
        if (cut and has_variants) or fewer != whole:
            seconds = None if fewer != _fitting(scenario, enough) else planned * ms[name] / 1e3
            shorter[name] = fewer, _reason(seconds, whole, fewer, has_variants)
    return shorter


def _fitting(scenario: Scenario, allowed: float) -> Steps:
    """Return the headline in `allowed` forwards: first with fewer passes, and then with shorter ones."""
    planned = steps(HEADLINE, scenario)
    count = len(planned.run)
    allowed = min(allowed, planned.passes * count)
    passes = min(planned.passes, max(MIN_PASSES, math.floor(allowed / count)))
    least = min(count, MIN_STEPS if scenario.mode == "decode" else 1)
    some = range(min(count, max(least, math.floor(allowed / passes))))
    return replace(planned, run=some, timed=some, passes=passes)


def _reason(seconds: float | None, planned: Steps, fewer: Steps, has_variants: bool) -> str:
    """Return, say, "a full timing takes about 46 s; running 6 passes of 2 instead of 10 of 10".

    `seconds`: what all of it would take; None where the time that is left is why.
    """
    why = "little time is left" if seconds is None else f"a full timing takes about {spoken(seconds)}"
    if fewer == planned:
        return f"{why}; leaving out its other timings"
    counts = f"{fewer.passes} passes of {len(fewer.run)} instead of {planned.passes} of {len(planned.run)}"
    return f"{why}; running {counts}{', and no other timings' * has_variants}"
