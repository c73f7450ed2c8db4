"""`StoreWatch`: notices that the store does not answer, since its operations wait without limit.

That is what they do when the process that holds the store is stopped, or its node is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

LOOK = 0.5  # seconds


class StoreWatch:
    """Calls `silent` from a thread of its own, once, after so many seconds without `answered`."""

    def __init__(self, seconds: float, silent: Callable[[], None]) -> None:
        self._looks, self._silent = max(1, round(seconds / LOOK)), silent
        self._quiet = 0  # looks: the time in which this process is itself stopped does not count
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="store watch", daemon=True).start()

    def __enter__(self) -> StoreWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def answered(self) -> None:
        """Record that the store has answered, or that nothing was asked."""
        self._quiet = 0

    def _run(self) -> None:
        while not self._closed.wait(LOOK):
            self._quiet += 1
            if self._quiet > self._looks:
                self._silent()
                return
