"""Whether there is a Triton that can interpret and compile the kernels as the tests do."""

from __future__ import annotations

from importlib import metadata

import pytest

OLDEST = (3, 6)


def lacking() -> str:
    """Return why there is none; "" if there is one."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed (extra `test-kernels`): kernels are neither interpreted nor compiled"
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
        return ""
    return f"Triton {version} is older than 3.6: kernels are neither interpreted nor compiled"


needs_triton = pytest.mark.skipif(bool(lacking()), reason=lacking())
