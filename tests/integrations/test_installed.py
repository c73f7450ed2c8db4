"""A `transformers` that cannot be served is one sentence at the import; tested with any torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mla.integrations.installed import OLDEST, require_transformers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("version", ["4.57.6", f"{OLDEST[0]}.{OLDEST[1] - 1}.9", f"{OLDEST[0]}.9.0"])
def test_a_release_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    expected = f"this needs transformers .+ or later, and {version} is installed: `pip install "
    with pytest.raises(ImportError, match=expected) as refused:
        require_transformers()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", [f"{OLDEST[0]}.{OLDEST[1]}.0", "5.100.0.dev0", "6.0.0rc1"])
def test_a_release_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    monkeypatch.setattr("transformers.utils.import_utils.is_torch_available", lambda: True)
    require_transformers()


def test_a_torch_that_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_torch_available", lambda: False)
    with pytest.raises(ImportError, match=f"does not work with torch {re.escape(torch.__version__)}: "):
        require_transformers()


@pytest.mark.parametrize("name", ["generate.py", "serve_loop.py"])
def test_an_example_says_so(name: str) -> None:
    program = (
        "import runpy, sys, transformers; transformers.__version__ = '5.2.0'; "
        f"sys.path.insert(0, {str(EXAMPLES)!r}); "
        f"runpy.run_path({str(EXAMPLES / name)!r}, None, '__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    of_an_old_torch = "[transformers] "
    said = [line for line in done.stderr.splitlines() if not line.startswith(of_an_old_torch)]
    assert len(said) == 1
    assert re.fullmatch(r"error: this needs transformers [\d.]+ or later, and 5\.2\.0 is .+", said[0])
