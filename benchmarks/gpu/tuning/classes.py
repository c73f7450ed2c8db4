"""What is tuned, as data: classes of calls that share a tile, their shapes, and the tiles that are tried."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from mla_backends.triton_ops.tuning import LEAST, Tile

Kind = Literal["latent", "expanded"]  # field of `Tuning`


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
class Common:
    """What all classes of latent attention have in common: fields of `Tuning` that are no tiles."""

    programs: int = 1
    halves: bool = True

    def __str__(self) -> str:
        return f"{self.programs} programs, latents {'in halves' if self.halves else 'whole'}"


@dataclass(frozen=True)
class TileClass:
    """Calls that share a tile: those of at least `least` query rows in a request, below the next class.

    Of `commons`, the first is that of the sweep over tiles.
    """

    name: str
    kind: Kind
    least: int
    shapes: tuple[Shape, ...]
    tiles: tuple[Tile, ...]
    commons: tuple[Common, ...] = (Common(),)

    @property
    def op(self) -> str:
        """The op that is called."""
        return f"triton_{self.kind}"


def _tiles(rows: Sequence[int], keys: Sequence[int], most_per_warp: int) -> tuple[Tile, ...]:
    """Return tiles of at most so many rows per warp.

    They come in an order that a sweep may be cut in anywhere: shuffled, always in the same way.
    """
    every = [Tile(*one) for one in product(rows, keys, (4, 8), (1, 2, 3))]
    found = [tile for tile in every if tile.rows <= most_per_warp * tile.warps and _plausible(tile)]
    random.Random(0).shuffle(found)
    return tuple(found)


def _plausible(tile: Tile) -> bool:
    """Return whether a tile is worth a try: few keys are for devices that have no room for more stages."""
    return tile.keys > LEAST or (tile.warps, tile.stages) == (4, 1)


def _decode(heads: int, *more: Shape) -> tuple[Shape, ...]:
    """Return decode steps from few long to many short requests; most exceed the last-level cache."""
    by_batch = ((1, 65536), (16, 1024), (32, 4096), (128, 2048))
    return (*(Shape(batch, keys, heads) for batch, keys in by_batch), *more)


# With two programs, small tiles are not at a disadvantage, of which several fit a multiprocessor.
COMMONS = (Common(2), Common(1), Common(3), Common(4), Common(2, halves=False))
# 512 channels of 16 rows in fp32 are half of a warp's registers; the output of expanded attention has 128.
_LATENT, _EXPANDED = 8, 32
FULL = (
    TileClass("latent-16", "latent", 1, _decode(16), _tiles((16,), (16, 32, 64, 128), _LATENT), COMMONS),
    TileClass("latent-64", "latent", 33, _decode(64), _tiles((16, 32, 64), (16, 32, 64), _LATENT), COMMONS),
    TileClass(
        "latent-128", "latent", 65, _decode(128, Shape(32, 4096, 128, 2)),
        _tiles((16, 32, 64), (16, 32, 64), _LATENT), COMMONS,
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

_TINY = (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))
_TINY_COMMONS = (Common(), Common(2), Common(halves=False))
SMOKE = (
    TileClass("latent-16", "latent", 1, (Shape(2, 70, 4),), _TINY, _TINY_COMMONS),
    TileClass("latent-64", "latent", 33, (Shape(1, 40, 34),), _TINY, _TINY_COMMONS),
    TileClass("latent-128", "latent", 65, (Shape(1, 40, 66),), _TINY[:1]),
    TileClass("expanded-64", "expanded", 1, (Shape(2, 40, 2, 20),), _TINY),
    TileClass("expanded-128", "expanded", 65, (Shape(1, 66, 2, 66),), _TINY[:1]),
)


def classes(smoke: bool) -> dict[str, TileClass]:
    """Return the classes by name."""
    return {one.name: one for one in (SMOKE if smoke else FULL)}


def finalists(best: Sequence[Tile], commons: Sequence[Common]) -> Iterator[tuple[Tile, Common]]:
    """Yield the best tiles with everything else that they may have in common."""
    yield from product(best, commons[1:])
