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


def doubt(passes: Sequence[PassTimes], idle: Sequence[PassTimes], on_host: bool) -> str:
    """Return why the times of passes cannot be right, or nothing; `idle` ran next to each of them.

    On the host (`on_host`) the process's CPU time must say the same, which other processes do not disturb.
    """
    regions = median(one.regions for one in passes)
    slack = SLACK * passes[0].forwards
    hidden = _excess([one.beside for one in passes], [one.beside for one in idle]) - slack
    if hidden <= MOST * regions:
        return ""
    busy = _excess([one.beside_cpu for one in passes], [one.beside_cpu for one in idle]) - slack
    if on_host and busy <= MOST * median(one.regions_cpu for one in passes):
        return ""
    share = 100 * regions / (regions + hidden)
    return (
        f"its clock covers {share:.0f}% of the time that its passes took: {hidden:.3g} ms of work per pass "
        "ran outside the timed forwards, as if `synchronize` returned early"
    )


def _excess(beside: Sequence[float], idle: Sequence[float]) -> float:
    """Return by how much a quiet pass exceeds a disturbed idle one: their lower and upper quartiles."""
    return percentile(beside, 25) - percentile(idle, 75)


def empty_doubt(passes: Sequence[PassTimes], idle: Sequence[PassTimes]) -> str:
    """Return why a region without a forward cannot take longer than one with it, or nothing if none did."""
    empty = median(one.regions / one.forwards for one in idle)
    full = median(one.regions / one.forwards for one in passes)
    if empty <= MORE * full + SLACK:
        return ""
    return (
        f"waiting for an idle device takes {empty:.3g} ms, longer than a forward with its wait "
        f"({full:.3g} ms): `synchronize` is not the same for everybody"
    )
