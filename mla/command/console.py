"""Where a command prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable


def note(text: str) -> None:
    """Print a remark where it cannot disturb the result."""
    with contextlib.suppress(BrokenPipeError):  # `2>&1 | head` must not end the run
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def out(text: str) -> None:
    """Print part of the result."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a name may not fit the terminal's
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)  # noqa: T201
    except BrokenPipeError:
        # The reader went away (`| head`): not an error of ours. click would exit with 1.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


Note = Callable[[str], None]
