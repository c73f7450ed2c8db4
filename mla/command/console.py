"""Where a command prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TextIO


def note(text: str) -> None:
    """Print a remark where it cannot disturb the result."""
    try:
        print(text, file=sys.stderr, flush=True)  # noqa: T201
    except BrokenPipeError:  # `2>&1 | head` must not end the run
        _discard(sys.stderr)


def out(text: str) -> None:
    """Print part of the result."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a name may not fit the terminal's
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader went away (`| head`): not an error of ours
        _discard(sys.stdout)


def flush() -> None:
    """Write out what libraries left in the streams, before Python does so and fails with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send what a stream holds, and all that follows, to nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


Note = Callable[[str], None]
