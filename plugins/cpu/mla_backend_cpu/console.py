"""What a user must be told even where nobody asks a backend for its remarks."""

from __future__ import annotations

import contextlib
import sys


def note(text: str) -> None:
    """Write a line to stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed, or be None
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
