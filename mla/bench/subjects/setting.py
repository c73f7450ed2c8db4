"""What all implementations of a run share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mla.bench.workload.grid import Point
from mla.config import MLAConfig
from mla_backends.api import Backend

# Pages beyond what a scenario needs; they stay NaN, so that reading a wrong page shows.
SPARE_PAGES = 16


@dataclass(frozen=True)
class Setting:
    """What all implementations of a run share."""

    config: MLAConfig
    backend: Backend
    dtype: torch.dtype
    attention: str
    page_size: int
    seed: int
    ops: str = "auto"  # policy of `mla.layer.ops.choose`, for the implementation `mla`
    layers: int = 1

    @property
    def device(self) -> torch.device:
        """The device `setup` returned."""
        assert self.backend.device is not None
        return self.backend.device


def scenario_setting(setting: Setting, scenario: Point) -> Setting:
    """Return the setting a scenario runs in: with its own heads, dtype and page size where it names them."""
    return replace(
        setting,
        config=setting.config.with_heads(scenario.heads) if scenario.heads else setting.config,
        dtype=getattr(torch, scenario.dtype) if scenario.dtype else setting.dtype,
        page_size=scenario.page_size or setting.page_size,
        layers=scenario.layers,
    )
