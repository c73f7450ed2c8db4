"""Rotary frequencies and the table of cosines and sines."""

from __future__ import annotations

from typing import Any

import torch

from mla.layer.rope import RotaryTable, inverse_frequencies

CPU = torch.device("cpu")


def test_angles_are_fp32_products_of_position_and_frequency(tiny: Any) -> None:
    config = tiny()
    table = RotaryTable(config, CPU, size=200_000)
    for position in (0, 1, 4097, 163_839):
        angle = torch.tensor(float(position)) * inverse_frequencies(config)
        assert torch.equal(table.table[position], torch.cat((angle.cos(), angle.sin())))


def test_the_table_grows_on_demand_and_keeps_its_rows(tiny: Any) -> None:
    table = RotaryTable(tiny(), CPU, size=4)
    before = table.table.clone()
    table.reserve(4)
    assert table.table.shape == (4, 8)
    table.reserve(5)
    assert table.table.shape == (8, 8)
    table.reserve(100)
    assert table.table.shape == (100, 8)
    assert torch.equal(table.table[:4], before)
