"""Rotary embedding: frequencies, scaled or not, and a table of cosines and sines that grows on demand.

Angles are fp32(position) * fp32(inv_freq), as DeepSeek's code and `transformers` both compute them; a
"better" angle would differ from both (7e-4 in the output at position 160k).
"""

from __future__ import annotations

import math

import torch

from mla.config import LongRopeScaling, MLAConfig, QueryScaling, YarnScaling


def inverse_frequencies(config: MLAConfig) -> torch.Tensor:
    """Return the rotary frequencies [r/2] in fp32, scaled as the config says; zeros where none rotate."""
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    if config.rope_theta is None:
        # Cosines of exactly 1 and sines of 0: a rotation that changes no bit.
        return torch.zeros(dim // 2, dtype=torch.float32, device="cpu")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    powers = config.rope_theta**exponents
    if scaling is None:
        return 1.0 / powers
    if isinstance(scaling, LongRopeScaling):
        return 1.0 / (torch.tensor(scaling.factors, dtype=torch.float32, device="cpu") * powers)
    ramp = _interpolation_ramp(scaling, dim, config.rope_theta)
    return 1.0 / powers / scaling.factor * ramp + 1.0 / powers * (1.0 - ramp)


def _interpolation_ramp(scaling: YarnScaling, dim: int, theta: float) -> torch.Tensor:
    """Return [r/2]: 0 keeps a frequency, 1 divides it by the factor (YaRN, section 3.2)."""

    def channel(rotations: float) -> float:
        """Return the channel that makes `rotations` turns over the original context."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)


def query_factors(scaling: QueryScaling, positions: torch.Tensor) -> torch.Tensor:
    """Return the factors [T], fp32, of queries at `positions` [T], on the same device."""
    periods = torch.div(positions, scaling.period, rounding_mode="floor")
    return 1.0 + scaling.beta * torch.log1p(periods.float())


TABLE_ROWS = 4096  # of a new table


class RotaryTable:
    """cos and sin for positions 0 .. size - 1, as one fp32 tensor [size, r] on the device.

    Row p holds the r/2 cosines of position p and then its r/2 sines, both times the YaRN magnitude.
    """

    def __init__(self, config: MLAConfig, device: torch.device, size: int = TABLE_ROWS) -> None:
        self._inv_freq = inverse_frequencies(config)
        self._magnitude = config.rope_scaling.magnitude() if config.rope_scaling else 1.0
        self._device = device
        self.table = self._compute(size)

    def _compute(self, size: int) -> torch.Tensor:
        angles = torch.outer(torch.arange(size, dtype=torch.float32, device="cpu"), self._inv_freq)
        return (torch.cat((angles.cos(), angles.sin()), dim=1) * self._magnitude).to(self._device)

    @staticmethod
    def bytes_for(config: MLAConfig, positions: int) -> int:
        """Return the most bytes of a table that has served `positions` positions."""
        rows = TABLE_ROWS if positions <= TABLE_ROWS else 2 * positions
        return 4 * rows * config.qk_rope_head_dim

    def reserve(self, positions: int) -> None:
        """Grow the table to at least `positions` rows, doubling so that growth stays rare."""
        size = self.table.shape[0]
        if positions > size:
            self.table = self._compute(max(positions, 2 * size))
