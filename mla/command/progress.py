"""Progress bars on stderr, shown only on a terminal and gone when the work is done."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

from rich import progress
from rich.console import Console

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
    """Counts estimated seconds; says what is running and how long the rest will take."""

    def __init__(self, seconds: float) -> None:
        super().__init__("starting", seconds)

    @property
    def hidden(self) -> bool:
        """True when stderr is not a terminal."""
        return self._bar.disable

    def advance(self, what: str, seconds: float) -> None:
        """Record the given number of estimated seconds. Called outside timed regions only."""
        self._bar.update(self._task, description=what, advance=seconds)
        self._bar.refresh()


class Reading(_Bar):
    """Counts the bytes of a checkpoint's layer."""

    def __init__(self, what: str) -> None:
        super().__init__(what, None, progress.DownloadColumn(), progress.TransferSpeedColumn())

    def advance(self, done: int, total: int) -> None:
        """Record that `done` bytes of `total` have been read."""
        self._bar.update(self._task, completed=done, total=total)
        self._bar.refresh()
