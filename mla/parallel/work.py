"""What a layout costs each rank: FLOPs and bytes of a forward, and room for tokens. Arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mla.config import MLAConfig
from mla.cost import (
    Work,
    head_parameters,
    kv_b_parameters,
    latent_attention_flops,
    parameters,
    projection_parameters,
    step_work,
)
from mla.parallel.layout import Layout


def rank_work(
    config: MLAConfig,
    layout: Layout,
    rank: int,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    itemsize: int,
    attention: str = "auto",
) -> Work:
    """Return what a rank must do in a forward of the layer `config`, counted as in `mla.cost`.

    `query_lens` and `kv_lens` are whole lengths of the requests of its `dp` part. Collectives move no bytes
    here. With `dcp`, of which every request is absorbed, `attention` does not count.
    """
    own = config.with_heads(config.num_attention_heads // layout.head_parts)
    if layout.dcp > 1:
        return _of_context(own, layout.dcp, layout.place(rank).dcp, query_lens, kv_lens, itemsize)
    return step_work(own, query_lens, kv_lens, itemsize, attention)


def _of_context(
    own: MLAConfig, world: int, place: int, query_lens: Sequence[int], kv_lens: Sequence[int], itemsize: int
) -> Work:
    """Return the work on every `world`-th token, from `place` on, for the heads of all ranks of `dcp`."""
    tokens, keys, new, pairs = sum(query_lens), 0, 0, 0
    for query_len, kv_len in zip(query_lens, kv_lens, strict=True):
        keys += _held(kv_len, world, place)
        new += _held(kv_len, world, place) - _held(kv_len - query_len, world, place)
        pairs += _pairs(query_len, kv_len, world, place)
    heads, c, r = world * own.num_attention_heads, own.kv_lora_rank, own.qk_rope_head_dim
    per_token = projection_parameters(own) + kv_b_parameters(own)
    flops = 2 * tokens * per_token + latent_attention_flops(heads, pairs, c, r)
    moved = parameters(own) + (keys + new) * own.latent_dim + 2 * tokens * own.hidden_size
    return Work(flops, itemsize * moved)


def _held(length: int, world: int, place: int) -> int:
    """Return how many of the first `length` tokens i have i mod world == place."""
    return (length + world - 1 - place) // world


def _pairs(query_len: int, kv_len: int, world: int, place: int) -> int:
    """Return the pairs of new tokens and keys that are held: the sum of `_held` over what they see."""
    first, shift = kv_len - query_len, world - 1 - place
    return _quotients(kv_len + shift, world) - _quotients(first + shift, world)


def _quotients(last: int, world: int) -> int:
    """Return the sum of x // world for x from 0 to `last`."""
    whole = (last + 1) // world
    return world * whole * (whole - 1) // 2 + whole * (last + 1 - whole * world)


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
