"""Work beside the clock: what a pass takes in all, against what its forwards are said to take.

A `synchronize` that returns early, or an op that finishes its work later, moves work out of the timed
regions. It still has to be done before the outputs are read. So the time of a pass that belongs to no forward
is compared with that of an idle pass, which does everything but the forwards. Both are disturbed by whatever
else runs on a machine: quiet passes must be slower than disturbed idle ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mla.bench.doubts.pass_times import PassTimes
from mla.bench.results.stats import percentile

# The share of the forwards' own time that may pass beside them. Honest passes were at most 0.15 on a busy
# machine with two CPUs; hiding a whole forward gives far more than 1.
MOST = 0.5
# How many times as long as a forward an empty region may seem to take, on a busy machine.
MORE = 1.5
# Milliseconds per forward that are nothing to speak of: caches are colder after a forward than after nothing.
SLACK = 0.01


def doubt(
    passes: Sequence[PassTimes], idle: Sequence[PassTimes], on_host: bool, quiet: float, disturbed: float
) -> str:
    """Return why the times of passes cannot be right, or nothing; `idle` ran next to each of them.

    Compared are the percentile `quiet` of passes and the percentile `disturbed` of idle ones. On the host
    (`on_host`) the process's CPU time must say the same, which other processes disturb less.
    """

    def excess(beside: Sequence[float], nothing: Sequence[float]) -> float:
        gap = percentile(beside, quiet) - percentile(nothing, disturbed)
        return gap - SLACK * passes[0].forwards

    regions = median(one.regions for one in passes)
    hidden = excess([one.beside for one in passes], [one.beside for one in idle])
    if hidden <= MOST * regions:
        return ""
    busy = excess([one.beside_cpu for one in passes], [one.beside_cpu for one in idle])
    if on_host and busy <= MOST * median(one.regions_cpu for one in passes):
        return ""
    share = 100 * regions / (regions + hidden)
    return (
        f"its clock covers {share:.0f}% of the time that its passes took: {hidden:.3g} ms of work per pass "
        "ran outside the timed forwards, as if `synchronize` returned early"
    )


def median_region(passes: Sequence[PassTimes]) -> float:
    """Return the median milliseconds of a timed region; 0.0 without one."""
    regions = [ms for one in passes for ms in one.inside]
    return median(regions) if regions else 0.0


def suspicion(passes: Sequence[PassTimes], idle: Sequence[PassTimes], on_host: bool) -> str:
    """Return what a busy machine may explain as well: more passes will tell."""
    return doubt(passes, idle, on_host, quiet=25, disturbed=75)


def lasting(more: Sequence[PassTimes], idle: Sequence[PassTimes], timed: float, on_host: bool) -> str:
    """Return why the doubt stands after more passes, or nothing.

    Passes that others disturbed say nothing. A quiet one among the rest suffices to take the doubt away,
    unless its forwards are slower than those of the timed passes, which took `timed` milliseconds in all:
    what was hidden there, and is not any more, was work.
    """
    more = [one for one in more if not one.disturbed]
    if not more:
        return ""
    fair = percentile([one.regions for one in more], 10)
    if fair > MORE * timed + SLACK * more[0].forwards:
        return f"repeated passes take {fair:.3g} ms where the timed ones took {timed:.3g} ms"
    return doubt(more, idle, on_host, quiet=10, disturbed=50)


def empty_doubt(passes: Sequence[PassTimes], idle: Sequence[PassTimes]) -> str:
    """Return why a region without a forward cannot take longer than one with it, or nothing if none did.

    Idle passes that others disturbed say nothing, and a few forwards that they made slow excuse nothing.
    """
    quiet = [one for one in idle if not one.disturbed]
    empty, full = median_region(quiet), median_region(passes)
    if not quiet or empty <= MORE * full + SLACK:
        return ""
    return (
        f"waiting for an idle device takes {empty:.3g} ms, longer than a forward with its wait "
        f"({full:.3g} ms): `synchronize` is not the same for everybody"
    )
