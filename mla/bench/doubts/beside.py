"""Work beside the clock: what a pass takes in all, against what its forwards are said to take.

A `synchronize` that returns early, or an op that finishes its work later, moves work out of the timed
regions. It still has to be done before the outputs are read. So the time of a pass that belongs to no forward
is compared with that of an idle pass, which does everything but the forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mla.bench.doubts.pass_times import PassTimes

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
    wall = median(_excess(one.beside, other.beside, one) for one, other in zip(passes, idle, strict=True))
    regions = median(one.regions for one in passes)
    if wall <= MOST * regions:
        return ""
    cpu = median(
        _excess(one.beside_cpu, other.beside_cpu, one) for one, other in zip(passes, idle, strict=True)
    )
    if on_host and cpu <= MOST * median(one.regions_cpu for one in passes):
        return ""
    share = 100 * regions / (regions + wall)
    return (
        f"its clock covers {share:.0f}% of the time that its passes took: {wall:.3g} ms of work per pass ran "
        "outside the timed forwards, as if `synchronize` returned early"
    )


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


def _excess(beside: float, idle: float, one: PassTimes) -> float:
    return beside - idle - SLACK * one.forwards
