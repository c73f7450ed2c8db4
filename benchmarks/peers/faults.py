"""Minor page faults per timed forward: what an allocator that gives memory back costs every time."""

from __future__ import annotations

import resource

from mla.bench.implementations import Implementation


def minor_faults() -> int:
    """Return the page faults of this process, all threads, that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class FaultCounter:
    """Counts an implementation's faults from outside its timed region.

    It counts from the end of `before(i)` to the start of `before(i + 1)`, so the last forward of a pass is
    left out. `restore` begins a pass; the first one after loading begins the warm-up, which is not counted.
    """

    def __init__(self, one: Implementation) -> None:
        self._restore, self._before = one.restore, one.before
        self._mark: int | None = None
        self.passes: list[list[int]] = []
        vars(one).update(restore=self.restore, before=self.before)  # keeps all else the runner may ask of it

    def restore(self) -> None:
        """Begin a pass."""
        self._restore()
        self.passes.append([])
        self._mark = None

    def before(self, index: int) -> None:
        """Take note of the faults since the last forward began."""
        if self._mark is not None and self.passes:
            self.passes[-1].append(minor_faults() - self._mark)
        self._before(index)
        self._mark = minor_faults()

    def per_forward(self) -> float | None:
        """Return the mean over the timed forwards, None when there were none."""
        counts = [count for one in self.passes[1:] for count in one]
        return sum(counts) / len(counts) if counts else None
