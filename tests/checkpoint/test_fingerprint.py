"""Two folders have the same fingerprint if they hold the same weights, however these lie in files."""

from __future__ import annotations

from pathlib import Path

import checkpoint_maker as maker
import pytest
import torch
from checkpoint_maker import Made
from safetensors.torch import load_file, save_file

from mla.checkpoint import fingerprint, read_layer


def of(made: Made) -> dict[str, str]:
    return fingerprint(read_layer(made.folder, made.config, made.layer))


@pytest.mark.parametrize(
    ("one", "other"), [("full-names", "sharded"), ("bare-names", "whole-layer"), ("fp8", "fp8-sharded")]
)
def test_names_and_shards_are_no_difference(tmp_path: Path, one: str, other: str) -> None:
    first = of(maker.LAYOUTS[one].make(tmp_path / "one"))
    assert first == of(maker.LAYOUTS[other].make(tmp_path / "other"))
    assert len({*first.values()}) == len(first)


@pytest.mark.parametrize("layout", ["biases", "fp8"])
def test_whatever_was_trained_further_is_named(tmp_path: Path, layout: str) -> None:
    made = maker.LAYOUTS[layout].make(tmp_path / "model")
    before = of(made)
    (file,) = made.folder.glob("*.safetensors")
    tensors = load_file(file)
    trained = [key for key in tensors if key.endswith((".weight", ".bias")) and "q_b" not in key]
    for key in trained:
        changed = tensors[key].view(torch.uint8).clone()
        changed[-1].bitwise_xor_(128)  # the last row alone, in its signs
        save_file(tensors | {key: changed.view(tensors[key].dtype)}, file, metadata={"format": "pt"})
        after = of(made)
        assert [name for name in before if before[name] != after[name]] == [key.rpartition("self_attn.")[2]]


def test_another_dtype_is_another_checkpoint(tmp_path: Path) -> None:
    first = of(maker.LAYOUTS["fp32"].make(tmp_path / "one"))
    second = of(maker.LAYOUTS["full-names"].make(tmp_path / "other"))
    assert {*first.values()}.isdisjoint(second.values())
