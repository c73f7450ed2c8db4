"""A sentence for a process that dies while a plugin is loaded: an abort leaves nobody here to say why."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

PATIENCE = 60.0  # seconds after which loading a backend is said to take long

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


@contextlib.contextmanager
def while_loading(name: str, patience: float = PATIENCE) -> Iterator[None]:
    """Have another process say on stderr that backend `name` takes long, or has ended this process."""
    why = f"`python -m mla.bench doctor {name}` finds out where\n"
    late = f"backend '{name}' has not been loaded and set up within {patience:g} s; {why}"
    dead = f"error: the process ended while backend '{name}' was loaded and set up; {why}"
    command = [sys.executable, "-I", "-S", "-c", _LISTENER, str(patience), late, dead]
    try:
        listener = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
    except OSError:  # no room for another process: it would only have talked
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.communicate(b".")
