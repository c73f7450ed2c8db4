"""How many tokens the memory of several devices holds, by layout. Arithmetic: nothing is run, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mla.config import MLAConfig
from mla.cost.step import head_parameters, parameters
from mla.parallel.layout import Layout


@dataclass(frozen=True)
class Capacity:
    """What `layout` leaves for the cache, and how many tokens that is; bytes are of one device."""

    layout: Layout
    weight_bytes: int
    cache_bytes: int  # 0 where the weights alone do not fit
    tokens: int  # of all devices together, each counted once
    copies: int  # of every token, on as many devices

    @property
    def repeated(self) -> float:
        """The share of all cached bytes that is a copy of others."""
        return 1 - 1 / self.copies


def capacity(config: MLAConfig, layout: Layout, memory: int, layers: int, itemsize: int = 2) -> Capacity:
    """Return what so many bytes on every device hold of `layers` layers and their cache.

    Weights count once, `itemsize` bytes each; of the cache, tokens without any room lost in pages.
    Raises `UsageError` where the heads cannot be split.
    """
    layout.check(config)
    split = head_parameters(config)
    weights = (parameters(config) - split + split // layout.head_parts) * itemsize * layers
    room = max(0, memory - weights)
    per_token = config.latent_dim * itemsize * layers
    return Capacity(layout, weights, room, room // per_token * layout.dcp * layout.dp, layout.tp)


def layouts(config: MLAConfig, world: int) -> Iterator[Layout]:
    """Yield every layout of so many ranks that the heads of `config` can be split by."""
    for dp in _divisors(world):
        for dcp in _divisors(world // dp):
            layout = Layout(tp=world // dp // dcp, dp=dp, dcp=dcp)
            if config.num_attention_heads % layout.head_parts == 0:
                yield layout


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
