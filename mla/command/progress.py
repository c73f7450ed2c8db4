"""Progress on stderr: a bar on a terminal, gone when the work is done, and a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from rich import progress
from rich.console import Console

from mla.command.console import note

# Seconds until the first line where stderr is not a terminal; the next takes twice as long, up to the most.
EVERY, SELDOM = 10.0, 80.0
# Part of the work from which the rest is estimated.
BEGUN = 0.05

_Self = TypeVar("_Self", bound="_Bar")


class _Bar:
    """A bar between a description and whatever columns a subclass adds."""

    def __init__(self, description: str, total: float | None, *columns: progress.ProgressColumn) -> None:
        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            *columns,
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=3600,  # scenarios differ: a short window would see only one of them
            auto_refresh=False,  # a refresh thread would disturb the timed region
        )
        self._task = self._bar.add_task(description, total=total)

    def __enter__(self: _Self) -> _Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class Progress(_Bar):
    """Counts forwards; says what is running and how long the rest will take."""

    def __init__(self, forwards: float, ends: Sequence[float] = ()) -> None:
        """`ends`: the real seconds in which all should be done, and those in which it must, if known."""
        super().__init__("starting", forwards)
        self._total, self._done, self._ends, self._every = forwards, 0.0, ends, EVERY
        self._start = self._said = time.monotonic()

    @property
    def hidden(self) -> bool:
        """True when stderr is not a terminal."""
        return self._bar.disable

    def advance(self, what: str, done: float) -> None:
        """Record that so many forwards are done. Called outside timed regions only."""
        self._bar.update(self._task, description=what, advance=done)
        self._bar.refresh()
        self._done += done
        now = time.monotonic()
        if self.hidden and now - self._said >= self._every:
            self._said, self._every = now, min(2 * self._every, SELDOM)
            note(f"running    {what}{self._left(now - self._start)}")

    def _left(self, taken: float) -> str:
        """Return how much longer it will take, if that can be told."""
        known = []  # limits come before the first forwards, and say nothing of them
        if self._done and self._done >= BEGUN * self._total:
            known.append(taken * (self._total - self._done) / self._done)
        known += [end - taken for end in self._ends if end > taken]
        if not known:
            return ""
        left = min(known)
        return f", about {left / 60:.0f} min left" if left >= 120 else f", about {left:.0f} s left"


class Reading(_Bar):
    """Counts the bytes of a checkpoint's layer."""

    def __init__(self, what: str) -> None:
        super().__init__(what, None, progress.DownloadColumn(), progress.TransferSpeedColumn())

    def advance(self, done: int, total: int) -> None:
        """Record that `done` bytes of `total` have been read."""
        self._bar.update(self._task, completed=done, total=total)
        self._bar.refresh()
