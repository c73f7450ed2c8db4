"""Minor page faults per timed forward: the cost of an allocator that returns memory to the system."""

from __future__ import annotations

import resource

from mla.bench.subjects.base import Implementation


def minor_faults() -> int:
    """Return the page faults of this process, over all threads, that needed no disk access."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class FaultCounter:
    """Count an implementation's faults per forward, from right before it to right after it.

    `restore` begins a pass; forwards before the first `restore` after loading are not counted.
    """

    def __init__(self, one: Implementation) -> None:
        self._restore, self._before, self._step, self._after = one.restore, one.before, one.step, one.after
        self._mark = 0
        self.passes: list[list[int]] = []
        # On the instance, so that the rest of its interface stays untouched.
        vars(one).update(restore=self.restore, before=self.before, step=self.step, after=self.after)

    def restore(self, number: int = 0) -> None:
        """Begin a pass."""
        self._restore(number)
        self.passes.append([])

    def before(self, index: int) -> None:
        """Record the faults so far."""
        self._before(index)
        self._mark = minor_faults()

    def step(self, index: int) -> None:
        """Run the forward."""
        self._step(index)

    def after(self, index: int) -> None:
        """Count the faults of the forward."""
        if self.passes:
            self.passes[-1].append(minor_faults() - self._mark)
        self._after(index)

    def per_forward(self) -> float | None:
        """Return the mean over the timed forwards, or None if there were none."""
        counts = [count for one in self.passes[1:] for count in one]
        return sum(counts) / len(counts) if counts else None
