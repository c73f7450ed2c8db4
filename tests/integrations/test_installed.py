"""A `transformers` that cannot be served is one sentence at the import; tested with any torch."""

from __future__ import annotations

import re

import pytest
import torch

from mla.integrations import OLDEST, require_transformers


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
