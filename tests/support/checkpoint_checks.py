"""The two ways a checkpoint can end: read bit for bit, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mla import MLAConfig
from mla.checkpoint import CheckpointError, read_layer


def same(read: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Check that two layers are equal, dtypes included."""
    assert set(read) == set(state)
    for name, weight in state.items():
        assert read[name].dtype == weight.dtype, name
        assert torch.equal(read[name], weight), name


def refused(folder: Path, config: MLAConfig, reason: str, layer: int | None = None) -> None:
    """Check that a layer cannot be read as a whole, for a reason that one sentence gives."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        dict(read_layer(folder, config, layer))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
