"""What asks a run to end interrupts it like Ctrl-C, so that what was measured is kept.

Slurm sends SIGTERM some time before it kills; SIGHUP comes when the terminal or the connection is gone.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Seconds in which another signal is taken for a copy of the first: srun and torchrun pass on what their tasks
# have got already, and nobody presses Ctrl-C only once. It must not stop the writing of the result.
AGAIN = 10.0

_HANDLERS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
_received: signal.Signals | None = None
_last = 0.0  # when that was


@contextmanager
def interrupting() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt within the block; `received` tells them apart.

    A signal that is ignored, as SIGHUP under nohup, or has a handler is left alone. Does nothing outside the
    main thread.
    """
    global _received
    _received = None
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in _HANDLERS.items() if main and signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _HANDLERS[number])


def received() -> signal.Signals | None:
    """Return the signal that arrived within the last block; None if there was none."""
    return _received


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received, _last
    now = time.monotonic()
    if _received is None or now - _last > AGAIN:
        _received, _last = signal.Signals(number), now
        raise KeyboardInterrupt
