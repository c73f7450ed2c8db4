"""A second opinion on the runner's clock."""

from __future__ import annotations

from mla.command.clock import MONOTONIC, cpu_ns, now_ns, system_ns

__all__ = ["SecondOpinion", "cpu_ns", "now_ns"]

# The relative difference of two clocks of one machine above which one of them is wrong.
WITHIN = 0.02
# The least time between two readings that are compared, in nanoseconds: below, the readings themselves count.
LEAST = 20_000_000


class SecondOpinion:
    """Compares the runner's clock with the system's, from when the object is made."""

    def __init__(self) -> None:
        self._start = (now_ns(), system_ns(MONOTONIC))

    def doubt(self) -> str:
        """Return why the clock cannot be right, or nothing."""
        ours, systems = now_ns() - self._start[0], system_ns(MONOTONIC) - self._start[1]
        if systems < LEAST or abs(ours / systems - 1) <= WITHIN:
            return ""
        advanced, real = f"{ours / 1e9:.3g} s", f"{systems / 1e9:.3g} s"
        return f"the process's clock advanced by {advanced} while the system's did by {real}"
