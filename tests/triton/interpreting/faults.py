"""What a kernel may do wrong that the interpreter by itself does not notice."""

from __future__ import annotations

import sys
from pathlib import Path


class KernelFault(Exception):
    """A kernel did what a device would not forgive."""


class OutOfBounds(KernelFault):
    """A load, store or atomic reached memory that belongs to no argument of the launch."""


class Overflow(KernelFault):
    """An int32 result did not fit."""


_MACHINERY = ("triton/language", "triton/runtime", "interpreting", "numpy")


def place() -> str:
    """Return the file and line of the kernel that is being interpreted."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not any(folder in path.parent.as_posix() for folder in _MACHINERY):
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
