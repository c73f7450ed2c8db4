"""What is tuned, as data: classes of calls that share a tile, their shapes, and the tiles that are tried."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from mla_backends.triton_ops.tuning import MIN_SIDE, Tile

Kind = Literal["latent", "expanded"]  # field of `Tuning`
Change = Mapping[str, Any]  # fields of `Tile` and their values


@dataclass(frozen=True)
class Shape:
    """Equal requests; `keys` of each include its new tokens."""

    batch: int
    keys: int
    heads: int
    queries: int = 1

    def __str__(self) -> str:
        new = f" x {self.queries} queries" if self.queries > 1 else ""
        return f"{self.batch} requests{new} x {self.keys} keys, {self.heads} heads"


@dataclass(frozen=True)
class TileClass:
    """Calls that share a tile: those of at least `least` query rows in a request, below the next class.

    The best tiles are tried again with each of `changes`.
    """

    name: str
    kind: Kind
    least: int
    shapes: tuple[Shape, ...]
    tiles: tuple[Tile, ...]
    changes: tuple[Change, ...] = ()

    @property
    def op(self) -> str:
        """The op that is called."""
        return f"triton_{self.kind}"

    def finalists(self, best: Sequence[Tile]) -> Iterator[Tile]:
        """Yield the best tiles with every change."""
        for tile, change in product(best, self.changes):
            yield replace(tile, **change)


def _tiles(
    rows: Sequence[int], keys: Sequence[int], most_per_warp: int, programs: int = 1
) -> tuple[Tile, ...]:
    """Return tiles of at most so many rows per warp, `programs` of each at a time.

    They come in an order that a sweep may be cut in anywhere: shuffled, always in the same way.
    """
    every = [Tile(*sizes, programs=programs) for sizes in product(rows, keys, (4, 8), (1, 2, 3))]
    plausible = [tile for tile in every if tile.rows <= most_per_warp * tile.warps and _plausible(tile)]
    random.Random(0).shuffle(plausible)
    return tuple(plausible)


def _plausible(tile: Tile) -> bool:
    """Return whether a tile is worth a try: few keys are for devices that have no room for more stages."""
    return tile.keys > MIN_SIDE or (tile.warps, tile.stages) == (4, 1)


def _decode(heads: int, *more: Shape) -> tuple[Shape, ...]:
    """Return decode steps from few long to many short requests; most exceed the last-level cache."""
    by_batch = ((1, 65536), (16, 1024), (32, 4096), (128, 2048))
    return (*(Shape(batch, keys, heads) for batch, keys in by_batch), *more)


# 512 channels of 16 rows in fp32 are half of a warp's registers; the output of expanded attention has 128.
_LATENT, _EXPANDED = 8, 32
# With two programs, small tiles are not at a disadvantage, of which several fit a multiprocessor.
_PROGRAMS = 2
_CHANGES: tuple[Change, ...] = ({"programs": 1}, {"programs": 3}, {"programs": 4}, {"halves": False})
FULL = (
    TileClass(
        "latent-16", "latent", 1, _decode(16),
        _tiles((16,), (16, 32, 64), _LATENT, _PROGRAMS), _CHANGES,
    ),
    TileClass(
        "latent-64", "latent", 33, _decode(64),
        _tiles((16, 32, 64), (16, 32, 64), _LATENT, _PROGRAMS), _CHANGES,
    ),
    TileClass(
        "latent-128", "latent", 65, _decode(128, Shape(32, 4096, 128, 2)),
        _tiles((16, 32, 64), (16, 32, 64), _LATENT, _PROGRAMS), _CHANGES,
    ),
    TileClass(
        "expanded-64", "expanded", 1,
        (Shape(32, 1040, 16, 16), Shape(8, 4160, 16, 64), Shape(4, 1088, 128, 64)),
        _tiles((16, 32, 64), (32, 64), _EXPANDED),
    ),
    TileClass(
        "expanded-128", "expanded", 65,
        (
            Shape(4, 704, 16, 704), Shape(1, 4096, 16, 4096), Shape(8, 4224, 16, 128),
            Shape(1, 2048, 128, 2048),
        ),
        _tiles((64, 128), (32, 64, 128), _EXPANDED),
    ),
)  # fmt: skip

_SMOKE_TILES = (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))
_SMOKE_CHANGES: tuple[Change, ...] = ({"programs": 2}, {"halves": False})
SMOKE = (
    TileClass("latent-16", "latent", 1, (Shape(2, 70, 4),), _SMOKE_TILES, _SMOKE_CHANGES),
    TileClass("latent-64", "latent", 33, (Shape(1, 40, 34),), _SMOKE_TILES, _SMOKE_CHANGES),
    TileClass("latent-128", "latent", 65, (Shape(1, 40, 66),), _SMOKE_TILES[:1]),
    TileClass("expanded-64", "expanded", 1, (Shape(2, 40, 2, 20),), _SMOKE_TILES),
    TileClass("expanded-128", "expanded", 65, (Shape(1, 66, 2, 66),), _SMOKE_TILES[:1]),
)


def classes(smoke: bool) -> dict[str, TileClass]:
    """Return the classes by name."""
    return {tiles.name: tiles for tiles in (SMOKE if smoke else FULL)}
