"""Minor page faults per timed forward: the cost of an allocator that returns memory to the system."""

from __future__ import annotations

import resource

from mla.bench.subjects.base import Implementation


def minor_faults() -> int:
    """Return the page faults of this process, over all threads, that needed no disk access."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class FaultCounter:
    """Count an implementation's faults per forward, from outside the timed region.

    `restore` begins a pass; forwards before the first `restore` after loading are not counted.
    """

    def __init__(self, one: Implementation) -> None:
        self._restore, self._before, self._after = one.restore, one.before, one.after
        self._mark = 0
        self.passes: list[list[int]] = []
        # On the instance, so that the rest of its interface stays untouched.
        vars(one).update(restore=self.restore, before=self.before, after=self.after)

    def restore(self) -> None:
        """Begin a pass."""
        self._restore()
        self.passes.append([])

    def before(self, index: int) -> None:
        """Record the faults so far."""
        self._before(index)
        self._mark = minor_faults()

    def after(self, index: int) -> None:
        """Count the faults of the forward."""
        if self.passes:
            self.passes[-1].append(minor_faults() - self._mark)
        self._after(index)

    def per_forward(self) -> float | None:
        """Return the mean over the timed forwards, or None if there were none."""
        counts = [count for one in self.passes[1:] for count in one]
        return sum(counts) / len(counts) if counts else None
