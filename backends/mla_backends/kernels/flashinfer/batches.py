"""Batches that FlashInfer's kernels cannot serve, though nothing stops them from trying.

Its scheduler packs all heads of a request's new tokens into rows, cuts these into tiles of 64, or 128 where
requests have more than 64 on average, and each tile's keys into parts. (Read in scheduler.cuh, mla.cuh and
mla_hopper.cuh of include/flashinfer/attention in 0.6.18; 0.7.2 refuses the same batches when it plans.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WORK_ITEMS = 16_384  # places in the tables of a plan
FAR = 1 << 32  # numbers: a page that starts beyond is read elsewhere, in releases before 0.6.11
MULTIPROCESSORS = 256  # where the device does not say; more than any has
# Shared memory of a multiprocessor, in bytes -> keys in a tile.
KEY_TILES = ((221_696, 64), (147_968, 32), (0, 16))


def work_reasons(heads: int, query_lens: Sequence[int], device: torch.device) -> list[str]:
    """Return why the tables of a plan may overflow, which memory behind them pays for (empty if they do not).

    Parts are at least as long as a cluster's fair share of all tiles' keys. So there are fewer additional
    parts than clusters, and the bound is above the true count by less than one per multiprocessor.
    """
    tile = _tile(heads, query_lens)
    items = sum(-(-count * heads // tile) for count in query_lens) + multiprocessors(device) // (tile // 64)
    if items <= WORK_ITEMS:
        return []
    return [
        f"its tables hold {WORK_ITEMS} parts of work, and {sum(query_lens)} new tokens of {heads} heads may "
        f"need {items}"
    ]


def tile_reasons(
    heads: int, query_lens: Sequence[int], kv_lens: Sequence[int], device: torch.device
) -> list[str]:
    """Return which token would miss its last key (empty if none would).

    Where a tile ends between the heads of a token, the keys its rows see are rounded down to whole tokens.
    The token's own key is then lost if it is the first of a tile of keys.
    """
    tile = _tile(heads, query_lens)
    if tile % heads == 0:
        return []
    keys_per_tile = key_tile(device)
    for request, (count, keys) in enumerate(zip(query_lens, kv_lens, strict=True)):
        for end in range(tile, count * heads, tile):
            token, cut = divmod(end, heads)
            own = keys - count + token
            if cut and own >= 0 and own % keys_per_tile == 0:
                return [
                    f"its tiles of {tile} rows cut tokens of {heads} heads, and new token {token} of request "
                    f"{request} would miss key {own}"
                ]
    return []


def far_reasons(kv_lens: Sequence[int], page_size: int | None, width: int) -> list[str]:
    """Return why pages of this batch must start beyond `FAR` (empty if they need not)."""
    size = page_size or 1
    numbers = sum(-(-keys // size) for keys in kv_lens) * size * width
    return [too_far(numbers)] if numbers > FAR else []


def too_far(numbers: int) -> str:
    """Say why a cache of so many numbers is refused."""
    return (
        f"this flashinfer finds pages in the first 2^32 numbers of a cache only, and this one has {numbers}: "
        "upgrade flashinfer to 0.6.11 or newer"
    )


def _tile(heads: int, query_lens: Sequence[int]) -> int:
    """Return the rows of a tile: those of one block or of a cluster of two."""
    return 128 if sum(query_lens) * heads // max(1, len(query_lens)) > 64 else 64


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has, or more."""
    return int(getattr(_properties(device), "multi_processor_count", None) or MULTIPROCESSORS)


def key_tile(device: torch.device) -> int:
    """Return how many keys a tile has; where the device does not say, the fewest, which divide all others."""
    shared = getattr(_properties(device), "shared_memory_per_multiprocessor", None) or 0
    return next(keys for least, keys in KEY_TILES if shared >= least)


@functools.cache
def _properties(device: torch.device) -> Any:
    import torch

    function = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    return None if function is None or device.type == "cpu" else function(device)
