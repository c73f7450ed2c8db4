"""SIGTERM ends a run like Ctrl-C: Slurm sends it some time before it kills, and what was measured is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_terminated = False


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt within the block; `terminated` tells it from Ctrl-C.

    Does nothing where SIGTERM already has a handler, and outside the main thread.
    """
    global _terminated
    _terminated = False
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def terminated() -> bool:
    """Return whether SIGTERM arrived within the last block."""
    return _terminated


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt once: srun passes on a SIGTERM that Slurm has sent to its tasks already."""
    global _terminated
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the writing of the result
    _terminated = True
    raise KeyboardInterrupt
