"""What Triton needs at run time and lacks here."""

from __future__ import annotations

from importlib.util import find_spec


def missing() -> list[str]:
    """Return a reason with its cure per thing that Triton lacks (empty if it has all)."""
    if find_spec("triton") is None:
        return ["triton is not installed: it comes with torch's wheels for CUDA, and with vendors' stacks"]
    return []
