"""A second opinion on the runner's clock."""

from __future__ import annotations

from mla.command.clock import MONOTONIC, cpu_ns, delayed_ns, now_ns, system_ns

__all__ = ["Disturbance", "SecondOpinion", "cpu_ns", "now_ns"]

# The relative difference of two clocks of one machine above which one of them is wrong.
WITHIN = 0.02
# The least time between two readings that are compared, in nanoseconds: below, the readings themselves count.
LEAST = 20_000_000


class SecondOpinion:
    """Compares the runner's clock with the system's, from when the object is made."""

    def __init__(self) -> None:
        self._start = _both()

    def doubt(self) -> str:
        """Return why the clock cannot be right, or nothing."""
        (before, start, after), (first, end, last) = self._start, _both()
        systems, least, most = end - start, first - after, last - before
        if systems < LEAST or (least <= (1 + WITHIN) * systems and (1 - WITHIN) * systems <= most):
            return ""
        advanced, real = f"{least / 1e9:.3g} s", f"{systems / 1e9:.3g} s"
        return f"the process's clock advanced by {advanced} while the system's did by {real}"


def _both() -> tuple[int, int, int]:
    """Return the system's clock between two readings of ours: others may get the CPU before each."""
    return now_ns(), system_ns(MONOTONIC), now_ns()


class Disturbance:
    """How long this process waited for a CPU that others had, from when the object is made.

    Work that others keep from running takes longer for no fault of its own. Where nobody counts such waiting,
    nothing is taken to be disturbed.
    """

    # The share of a time that its threads may have waited together.
    MOST = 0.1

    def __init__(self) -> None:
        self._start = delayed_ns()

    def milliseconds(self) -> float:
        """Return the milliseconds that all threads waited together."""
        end = delayed_ns()
        return 0.0 if end is None or self._start is None else max(0, end - self._start) / 1e6

    def spoils(self, milliseconds: float) -> bool:
        """Return whether so many milliseconds since the start were disturbed."""
        return self.milliseconds() > self.MOST * milliseconds
