"""Rotary frequencies and the table of cosines and sines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mla import MLAConfig
from mla.config import YarnScaling
from mla.layer.rope import RotaryTable, inverse_frequencies

CPU = torch.device("cpu")


def test_plain_frequencies_are_powers_of_theta(tiny: Any) -> None:
    config = tiny(rope_theta=500.0)
    truth = [500.0 ** (-i / 8) for i in range(0, 8, 2)]
    assert inverse_frequencies(config).tolist() == pytest.approx(truth, rel=3e-7)


def test_yarn_keeps_fast_channels_and_divides_slow_ones() -> None:
    """At DeepSeek's dimensions the ramp runs from channel 10 to channel 23."""
    config = MLAConfig.preset("deepseek-r1")
    truth = [10000.0 ** (-i / 64) for i in range(0, 64, 2)]
    frequencies = inverse_frequencies(config).tolist()
    assert frequencies[:11] == pytest.approx(truth[:11], rel=3e-7)
    assert frequencies[23:] == pytest.approx([value / 40 for value in truth[23:]], rel=3e-7)
    middle = [frequencies[i] / truth[i] for i in range(11, 23)]
    assert middle == pytest.approx([1 - (1 - 1 / 40) * (i - 10) / 13 for i in range(11, 23)], rel=1e-6)


@pytest.mark.parametrize(
    ("scaling", "magnitude", "factor"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.873854),  # R1
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0, 1.589626),  # V2-Lite
        ({}, 1.3689, 1.0),
        ({"mscale_all_dim": 1.0}, 1.3689, 1.8739),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 1.3689, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0}, 1.3689, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, 0.9210, 1.8739),
    ],
)
def test_magnitude_and_softmax_factor_of_every_mscale_variant(
    tiny: Any, scaling: dict[str, float], magnitude: float, factor: float
) -> None:
    config = tiny(rope_scaling=YarnScaling(40, 4096, **scaling))
    assert config.rope_scaling.magnitude() == pytest.approx(magnitude, abs=5e-5)
    assert config.rope_scaling.softmax_factor() == pytest.approx(factor, abs=5e-5)
    assert config.softmax_scale == pytest.approx(24**-0.5 * factor, rel=5e-5)
    row = RotaryTable(config, CPU, size=4).table[0]
    assert row.tolist() == pytest.approx([magnitude] * 4 + [0.0] * 4, abs=5e-5)


def test_the_softmax_scale_comes_from_the_head_and_not_from_the_latent() -> None:
    assert MLAConfig.preset("deepseek-r1").softmax_scale == pytest.approx(192**-0.5 * 1.873854, rel=1e-6)
    assert MLAConfig.preset("deepseek-v2-lite").softmax_scale == pytest.approx(192**-0.5 * 1.589626, rel=1e-6)


def test_angles_are_fp32_products_of_position_and_frequency(tiny: Any) -> None:
    config = tiny()
    table = RotaryTable(config, CPU, size=200_000)
    for position in (0, 1, 4097, 163_839):
        angle = torch.tensor(float(position)) * inverse_frequencies(config)
        assert torch.equal(table.gather(torch.tensor([position]))[0], torch.cat((angle.cos(), angle.sin())))


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


def test_a_rotation_keeps_lengths(tiny: Any) -> None:
    cos, sin = RotaryTable(tiny(), CPU, size=64).table.chunk(2, dim=1)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(64, 4), atol=1e-6, rtol=0)
    assert math.isclose(cos[1, 0].item(), math.cos(1.0), rel_tol=1e-6)
