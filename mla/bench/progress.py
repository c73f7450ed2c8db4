"""A progress bar on stderr, shown only on a terminal and gone when the work is done."""

from __future__ import annotations

from types import TracebackType

from rich import progress
from rich.console import Console


class Progress:
    """Counts forwards; says what is running and how long the rest will take."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            auto_refresh=False,  # a refresh thread would disturb the timed region
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, what: str, done: int) -> None:
        """Record `done` forwards. Called outside timed regions only."""
        self._bar.update(self._task, description=what, advance=done)
        self._bar.refresh()
