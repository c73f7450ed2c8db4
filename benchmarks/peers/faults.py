"""Minor page faults per timed forward: what an allocator that gives memory back costs every time."""

from __future__ import annotations

import resource

from mla.bench.subjects.base import Implementation


def minor_faults() -> int:
    """Return the page faults of this process, all threads, that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class FaultCounter:
    """Counts an implementation's faults around its forwards, from outside the timed region.

    `restore` begins a pass; what runs before the first one after loading is not counted.
    """

    def __init__(self, one: Implementation) -> None:
        self._restore, self._before, self._after = one.restore, one.before, one.after
        self._mark = 0
        self.passes: list[list[int]] = []
        # On the instance: all else that the runner may ask of it stays as it is.
        vars(one).update(restore=self.restore, before=self.before, after=self.after)

    def restore(self) -> None:
        """Begin a pass."""
        self._restore()
        self.passes.append([])

    def before(self, index: int) -> None:
        """Take note of the faults until now."""
        self._before(index)
        self._mark = minor_faults()

    def after(self, index: int) -> None:
        """Count the faults of the forward."""
        if self.passes:
            self.passes[-1].append(minor_faults() - self._mark)
        self._after(index)

    def per_forward(self) -> float | None:
        """Return the mean over the timed forwards, None when there were none."""
        counts = [count for one in self.passes[1:] for count in one]
        return sum(counts) / len(counts) if counts else None
