"""Every vendor's whole life on an emulated device. The tests are in `inside/`, one process per vendor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

INSIDE = Path(__file__).parent / "inside"


@pytest.mark.parametrize("backend", ["moore", "nvidia", "metax", "iluvatar"])
def test_the_whole_life_of(backend: str, emulate: Any) -> None:
    configuration = ("-c", str(INSIDE / "pytest.ini"), f"--confcutdir={INSIDE}", "-p", "no:cacheprovider")
    done = emulate(backend, "-m", "pytest", *configuration, str(INSIDE), EMULATED_BACKEND=backend)
    assert done.code == 0, done.out + done.err
    found = re.search(r"(\d+) passed", done.out)
    assert found, done.out
    assert int(found[1]) >= 30
