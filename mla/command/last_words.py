"""A sentence for a process that dies in a plugin's code: an abort leaves nobody here to say why."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

PATIENCE = 60.0  # seconds after which loading a backend is said to take long
NEVER = 1e6  # seconds: longer than a run

# Reads from a pipe that ends with this process. One byte means that all went well.
_LISTENER = """
import select, sys
late, dead = sys.argv[2:]
if not select.select([0], [], [], float(sys.argv[1]))[0]:
    sys.stderr.write(late)
    sys.stderr.flush()
if not sys.stdin.buffer.read(1):
    sys.stderr.write(dead)
"""


# Listeners that have not been told that all went well.
_LISTENING: list[subprocess.Popen[bytes]] = []


@contextlib.contextmanager
def while_loading(name: str, patience: float = PATIENCE) -> Iterator[None]:
    """Have another process say on stderr that backend `name` takes long, or has ended this process."""
    why = f"`python -m mla.bench doctor {name}` finds out where\n"
    late = f"backend '{name}' has not been loaded and set up within {patience:g} s; {why}"
    dead = f"error: the process ended while backend '{name}' was loaded and set up; {why}"
    with _listening(patience, late, dead):
        yield


@contextlib.contextmanager
def while_running(name: str) -> Iterator[None]:
    """Have another process say on stderr that this one has ended while backend `name` ran."""
    dead = (
        f"error: the process ended while backend '{name}' ran: aborted by a library below it, or killed, as "
        "for memory; `python -X faulthandler -m mla.bench ...` shows where\n"
    )
    with _listening(NEVER, "", dead):
        yield


def dismiss() -> None:
    """Let this process end on purpose, without a word: before `os._exit`."""
    while _LISTENING:
        with contextlib.suppress(OSError):
            _LISTENING.pop().communicate(b".")


@contextlib.contextmanager
def _listening(patience: float, late: str, dead: str) -> Iterator[None]:
    command = [sys.executable, "-I", "-S", "-c", _LISTENER, str(patience), late, dead]
    try:
        listener = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
    except OSError:  # no room for another process: it would only have talked
        yield
        return
    _LISTENING.append(listener)
    try:
        yield
    finally:
        if listener in _LISTENING:
            _LISTENING.remove(listener)
            with contextlib.suppress(OSError):
                listener.communicate(b".")
