"""How the keys of a batch are split over programs, so that all multiprocessors have work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_backends.triton_ops.tuning import Tile

# A part of fewer keys costs more to merge than it saves.
LEAST_KEYS = 128
# Parts of one request; what a graph may be replayed with has no other bound.
MOST_SPLITS = 128
# Bytes of the parts of a batch. A few long requests among many short ones could take much more.
PARTS_BYTES = 256 << 20
# Lengths count as equal while the longest is at most this many times the mean.
EQUAL = 1.25


@dataclass(frozen=True)
class Splits:
    """The run-time arguments of the kernels: requests of up to `keys_per_split` keys have one part."""

    keys_per_split: int
    max_splits: int  # of any request that fits the block table


def split(
    query_rows: Sequence[int],
    kv_lens: Sequence[int],
    capacity: int,
    row_bytes: int,
    tile: Tile,
    programs: int,
) -> Splits:
    """Return the splits for requests with so many query rows (new tokens times heads) and keys.

    `capacity`: the most keys that a request may grow to; `row_bytes`: of one part of a query row; `programs`:
    how many the device runs at a time.
    """
    blocks = [-(-rows // tile.rows) for rows in query_rows]
    longest, total = max(kv_lens), sum(b * n for b, n in zip(blocks, kv_lens, strict=True))
    if total == 0:
        keys = LEAST_KEYS
    elif longest * sum(blocks) <= EQUAL * total:  # equal: one program more begins a second wave
        keys = -(-longest // max(1, programs // sum(blocks)))
    else:
        keys = -(-total // programs)
    keys = max(LEAST_KEYS, -(-keys // tile.keys) * tile.keys)
    most = min(MOST_SPLITS, PARTS_BYTES // (max(1, sum(query_rows)) * row_bytes))
    return Splits(keys, max(1, min(most, -(-capacity // keys))))
