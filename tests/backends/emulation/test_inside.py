"""Every vendor's whole life on an emulated device. The tests are in `inside/`, one process per vendor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from triton_here import needs_triton

HERE = Path(__file__).parent


def checked(emulate: Any, backend: str, folder: Path) -> int:
    """Run the checks of a folder in a process with the emulated device; return how many passed."""
    configuration = ("-c", str(folder / "pytest.ini"), f"--confcutdir={folder}", "-p", "no:cacheprovider")
    done = emulate(backend, "-m", "pytest", *configuration, str(folder), EMULATED_BACKEND=backend)
    assert done.code == 0, done.out + done.err
    match = re.search(r"(\d+) passed", done.out)
    assert match, done.out
    return int(match[1])


@pytest.mark.parametrize("backend", ["moore", "nvidia", "metax", "iluvatar"])
def test_the_whole_life_of(backend: str, emulate: Any) -> None:
    assert checked(emulate, backend, HERE / "inside") >= 30


@needs_triton
@pytest.mark.parametrize("backend", ["moore", "nvidia"])
def test_our_triton_kernels_on(backend: str, emulate: Any) -> None:
    """In a process of its own: once Triton interprets kernels, it does so in all of them."""
    assert checked(emulate, backend, HERE / "interpreted") >= 6
