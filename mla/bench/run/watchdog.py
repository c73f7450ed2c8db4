"""Notice a device that hangs: no forward finishes for a long time although one was started.

A call into a driver cannot be interrupted, so the only way out is the end of the process. The thread sleeps;
the timed path is not touched, since the engine reports progress between timed regions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

# Looks per limit; a hang is noticed at most one look late.
LOOKS = 4

Hung = Callable[[str, str], None]  # scenario, implementation


class Watchdog:
    """Calls `hung` from a thread of its own when nothing happens for `limit` seconds while `watching`."""

    def __init__(self, limit: float, hung: Hung) -> None:
        self._limit, self._hung = limit, hung
        self._beats = 0
        self._scenario: str | None = None
        self._implementation = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @contextmanager
    def watching(self, scenario: str) -> Iterator[None]:
        """Expect forwards to finish inside this block: not while the host computes the oracle."""
        self._beats += 1
        self._scenario = scenario
        try:
            yield
        finally:
            self._scenario = None

    def enter(self, implementation: str) -> None:
        """Record which implementation runs."""
        self._implementation = implementation
        self.beat()

    def beat(self) -> None:
        """Record that a forward has finished."""
        self._beats += 1

    def _watch(self) -> None:
        seen, quiet = -1, 0
        while not self._done.wait(self._limit / LOOKS):
            scenario = self._scenario
            quiet = quiet + 1 if scenario is not None and seen == self._beats else 0
            seen = self._beats
            if scenario is not None and quiet >= LOOKS:
                self._hung(scenario, self._implementation)
                return
