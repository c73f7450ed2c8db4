"""Each rank's part of the weights, from memory and from disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import checkpoint_maker as maker
import pytest
import torch
from layer_of_a_rank import PLAIN

from mla import MLAConfig
from mla.checkpoint import folder as files
from mla.checkpoint import read_layer
from mla.errors import WeightError
from mla.parallel.layer import HeadShard
from mla.weights import random_state_dict

CONFIG = dataclasses.replace(PLAIN, num_attention_heads=4, q_lora_rank=24, attention_bias=True)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, q_lora_rank=None, output_gate="head"),
        dataclasses.replace(CONFIG, output_gate="element", sink_logits=True),
    ],
    ids=["lora", "plain", "gate"],
)
def test_parts_put_together_are_the_whole(config: MLAConfig) -> None:
    state = random_state_dict(config)
    parts = [HeadShard(state, config, part, 2) for part in range(2)]
    assert list(parts[0]) == list(state)
    for name, weight in state.items():
        if name in ("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight", "g_proj.weight", "sinks"):
            assert torch.equal(torch.cat([part[name] for part in parts]), weight)
        elif name == "o_proj.weight":
            assert torch.equal(torch.cat([part[name] for part in parts], dim=1), weight)
        elif name == "o_proj.bias":
            assert torch.equal(parts[0][name], weight)
            assert not parts[1][name].any(), "outputs are added up, and would have the bias twice"
        else:
            assert all(torch.equal(part[name], weight) for part in parts)


@pytest.mark.parametrize(
    ("layout", "size"),
    [("fp8", "ragged"), ("fp8-sharded", "tiny"), ("sharded", "tiny"), ("biases", "ragged")],
)
def test_a_part_of_a_checkpoint_is_that_of_its_weights(layout: str, size: str, tmp_path: Path) -> None:
    made = maker.LAYOUTS[layout].make(tmp_path / "model", size)
    heads = made.config.num_attention_heads
    stored = read_layer(made.folder, made.config, made.layer)
    for part in range(heads):
        lazy = HeadShard(stored, made.config, part, heads)
        plain = HeadShard(made.state, made.config, part, heads)
        for name in plain:
            assert torch.equal(lazy[name], plain[name]), name
            assert lazy.shape(name) == plain[name].shape


def test_nothing_but_the_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = maker.LAYOUTS["fp8"].make(tmp_path / "model", "ragged")
    heads, read = made.config.num_attention_heads, 0
    rows = files.StoredTensor.rows

    def counted(
        self: files.StoredTensor, start: int, stop: int, columns: slice = slice(None)
    ) -> torch.Tensor:
        nonlocal read
        part = rows(self, start, stop, columns)
        read += part.numel() if "scale" not in self.key else 0
        return part

    monkeypatch.setattr(files.StoredTensor, "rows", counted)
    shard = HeadShard(read_layer(made.folder, made.config, made.layer), made.config, 1, heads)
    for name in ("kv_b_proj.weight", "o_proj.weight"):
        read = 0
        assert name in shard
        part = shard[name]
        assert read == part.numel() == made.state[name].numel() // heads


def test_weights_that_do_not_fit_are_named_before_anything_is_read() -> None:
    state = random_state_dict(CONFIG)
    with pytest.raises(
        WeightError, match=r"weight 'o_proj.weight' has shape \[48, 24\], expected \[48, 48\]"
    ):
        HeadShard({**state, "o_proj.weight": state["o_proj.weight"][:, :24]}, CONFIG, 0, 2)
    with pytest.raises(WeightError, match="does not belong"):
        HeadShard({**state, "extra": torch.ones(1)}, CONFIG, 0, 2)
    HeadShard({**state, "extra": torch.ones(1)}, CONFIG, 0, 2, strict=False)
