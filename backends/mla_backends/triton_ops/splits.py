"""How the keys of a batch are split over programs, so that all multiprocessors have work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul

from mla_backends.triton_ops.tuning import Tile

# A part of fewer keys costs more to merge than it saves.
LEAST_KEYS = 64
# Parts of one request.
MOST_SPLITS = 256
# Bytes of the parts of a batch, whatever its lengths; with very many rows nothing is split.
PARTS_BYTES = 256 << 20
# What a program costs besides its keys, and a merge besides its programs, in keys: estimates.
PROGRAM_KEYS, MERGE_KEYS = 96, 64
# Waves of programs that are considered; more do not balance any better.
WAVES = 4
# Ragged requests whose programs are counted; of more they are estimated, because planning is part of a step.
COUNTED = 16


@dataclass(frozen=True)
class Splits:
    """The run-time arguments of the kernels: requests of up to `keys_per_split` keys have one part."""

    keys_per_split: int
    max_splits: int  # of any request that fits the block table


@dataclass(frozen=True)
class _Load:
    """Blocks of rows and keys of the requests that have some."""

    blocks: list[int]
    keys: list[int]
    longest: int
    equal: bool  # all have as many keys
    all_blocks: int
    total: int  # keys, block by block

    def programs(self, part: int) -> int:
        """Return how many programs there are with parts of at most this many keys."""
        if self.equal:
            return self.all_blocks * -(-self.longest // part)
        if len(self.keys) > COUNTED:  # half a part more for each, as lengths are of all kinds
            return self.total // part + (self.all_blocks + 1) // 2
        return sum(blocks * -(-keys // part) for blocks, keys in zip(self.blocks, self.keys, strict=True))

    def cost(self, part: int, at_once: int) -> float:
        """Return an estimate of the time with such parts, in keys: of whole waves, or of a full device."""
        programs = self.programs(part)
        waves = -(-programs // at_once) * (part + PROGRAM_KEYS)
        packed = (self.total + programs * PROGRAM_KEYS) / at_once + part + PROGRAM_KEYS
        return min(waves, packed) + (MERGE_KEYS if part < self.longest else 0)


def split(
    query_rows: Sequence[int],
    kv_lens: Sequence[int],
    capacity: int,
    row_bytes: int,
    tile: Tile,
    multiprocessors: int,
) -> Splits:
    """Return the splits for requests with so many query rows (new tokens times heads) and keys.

    `capacity`: the most keys that a request may grow to; `row_bytes`: of one part of a query row.
    """
    requests = zip(query_rows, kv_lens, strict=True)
    some = [(-(-rows // tile.rows), keys) for rows, keys in requests if rows and keys]
    if not some:
        return Splits(max(LEAST_KEYS, capacity), 1)
    blocks, keys = (list(column) for column in zip(*some, strict=True))
    longest, total = max(keys), sum(map(mul, blocks, keys))
    load = _Load(blocks, keys, longest, min(keys) == longest, sum(blocks), total)
    at_once = multiprocessors * tile.programs
    part = min(_candidates(load, at_once), key=lambda one: load.cost(one, at_once))
    # A little longer, so that a captured step has as many parts when its lengths have grown a little.
    reach = min(capacity, part + part // 16 + (LEAST_KEYS if part == load.longest else 0))
    chosen = -(-reach // tile.keys) * tile.keys
    useful = max(-(-longest // chosen), -(-WAVES * at_once // load.all_blocks))
    most = min(MOST_SPLITS, PARTS_BYTES // (sum(query_rows) * row_bytes), useful)
    return Splits(chosen, max(1, min(most, -(-capacity // chosen))))


def _candidates(load: _Load, at_once: int) -> Iterator[int]:
    """Yield lengths of parts: none is split, or the programs make up so many waves."""
    yield load.longest
    blocks = load.all_blocks
    for waves in range(1, WAVES + 1):
        programs = waves * at_once
        lengths = [-(-load.longest // max(1, programs // blocks))]
        if not load.equal:
            lengths.append(-(-load.total // max(1, programs - blocks // 2)))
        yield from (min(load.longest, max(LEAST_KEYS, length)) for length in lengths)
