"""`Tuning`: tiles and splits of the Triton kernels, as data that a plugin chooses or `tune.py` writes."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mla_backends import outside
from mla_backends.errors import BackendError
from mla_backends.outside import escaped, quoted, shortened

FORMAT = 1  # of the file
CURE = "`tune-choose` of benchmarks/gpu writes one; without one, the plugin's defaults are used."
MAX_SIZE = 65536  # of anything that a tile counts
PAGES_WARPS, PAGES_ROWS = 4, 32  # of a step with the fewest keys, of several pages
PARTS_KEYS = 32  # of a step over numbers of two parts: 66 KiB of shared memory
MIN_SIDE = 16  # rows or keys of a tile: the least that `tl.dot` takes


@dataclass(frozen=True)
class Tile:
    """One configuration of an attention kernel. Raises ValueError for sizes that Triton cannot compile.

    With `halves` latents are multiplied and summed in two halves: fewer registers, but more tensor memory.
    `programs`: how many of them a multiprocessor runs at a time; keys are split so that it has as many.
    `spread`: warps share the columns of a score of 64 rows and more, which sums in tensor memory do not need:
    a card that has it is told from the others by this.
    """

    rows: int  # of queries in a program
    keys: int  # of a step
    warps: int
    stages: int
    halves: bool = True
    programs: int = 1
    spread: bool = True

    def __post_init__(self) -> None:
        for name, least in (("rows", MIN_SIDE), ("keys", MIN_SIDE), ("warps", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MAX_SIZE or value & (value - 1):
                raise ValueError(
                    f"{name} must be a power of two from {least} to {MAX_SIZE}, got {quoted(value)}."
                )
        for name in ("stages", "programs"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name} must be a number from 1 to {MAX_SIZE}, got {quoted(value)}.")
        for name in ("halves", "spread"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {quoted(getattr(self, name))}.")

    @property
    def resources(self) -> dict[str, int]:
        """What a launch takes of a multiprocessor, as `Launcher.start` is told it."""
        return {"warps": self.warps, "stages": self.stages, "programs": self.programs}

    def smaller(self) -> Iterator[Tile]:
        """Yield tiles that need less and less of a multiprocessor, down to the smallest.

        Keys go first, then stages: one stage may need more shared memory than two of the same tile.
        """
        tile = self
        while True:
            if tile.keys > MIN_SIDE:
                tile = replace(tile, keys=tile.keys // 2)
            elif tile.stages > 1:
                tile = replace(tile, stages=tile.stages - 1)
            elif tile.rows > MIN_SIDE:
                tile = replace(tile, rows=tile.rows // 2, keys=self.keys, stages=self.stages)
            elif tile.warps > 1:
                tile = replace(tile, warps=tile.warps // 2)
            else:
                return
            yield tile

    def across_pages(self) -> Tile:
        """Return the tile for steps whose keys lie in several pages, which take more registers.

        It has half the keys, and one stage more where it has several. One of whole latents that has the
        fewest keys has halves, and at least PAGES_WARPS and at most PAGES_ROWS.
        """
        if self.keys > MIN_SIDE:
            return replace(self, keys=self.keys // 2, stages=self.stages + (self.stages > 1))
        if self.halves:
            return self
        rows, warps = min(self.rows, PAGES_ROWS), max(self.warps, PAGES_WARPS)
        return replace(self, rows=rows, warps=warps, halves=True)

    def of_bytes(self, parts: bool) -> Tile:
        """Return the tile for a cache of bytes, whose numbers lie in registers before they are multiplied.

        It has halves, and more warps, which take the place of other programs; but its own on cards for one
        stage, whose warps may be wider. Where sums lie in tensor memory it has the fewest keys and one stage
        instead of halves. With numbers of two `parts` it has the fewest rows, and PARTS_KEYS, which spill
        beside tensor memory and do not fit cards for one stage.
        """
        if parts:
            fewest = not self.spread or self.stages == 1
            keys, warps = (MIN_SIDE, 4) if fewest else (PARTS_KEYS, 8)
            return replace(self, rows=MIN_SIDE, keys=keys, warps=warps, halves=True, programs=1)
        warps = self.warps if self.stages == 1 else max(self.warps, min(8, 2 * self.warps))
        tile = replace(self, warps=warps, programs=1)
        if self.rows < 64:
            return replace(tile, halves=True)
        if not self.spread:
            return replace(tile, keys=MIN_SIDE, stages=1)
        return replace(
            tile, halves=True, stages=1 if (self.keys, self.stages) == (MIN_SIDE, 2) else self.stages
        )

    def __str__(self) -> str:
        sizes = f"{self.rows} rows x {self.keys} keys, {self.warps} warps, {self.stages} stages"
        halves = ", halves" if self.halves else ""
        return sizes + halves + (f", {self.programs} programs" if self.programs > 1 else "")


Tiles = Mapping[int, Tile]  # the least number of query rows it is for -> tile; one of them is for 1


@dataclass(frozen=True)
class Tuning:
    """What a plugin chooses for a card.

    `latent` is by the query rows of a request (new tokens times heads), `expanded` by the queries of a
    segment. `caches` holds tiles in place of `latent`, by cache format: see `of_latents`. Files have none.
    """

    latent: Tiles
    expanded: Tiles
    source: str = "defaults of the plugin"  # for the environment in results
    caches: Mapping[str, Tiles] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("latent", "expanded"):
            tiles = getattr(self, name)
            if 1 not in tiles or any(type(least) is not int or least < 1 for least in tiles):
                raise ValueError(f"{name} needs a tile for 1 row on, and whole numbers of rows.")
            object.__setattr__(self, name, MappingProxyType(dict(tiles)))

    def of_latents(self, cache_format: str, sparse: bool) -> Tiles:
        """Return the tiles of attention over a cache of this format; sparse attention has `latent`."""
        return self.latent if sparse else self.caches.get(cache_format, self.latent)


def tile_for(tiles: Tiles, rows: int) -> Tile:
    """Return the tile for this many query rows."""
    return tiles[max((least for least in tiles if least <= rows), default=1)]


def card_file(name: str) -> str:
    """Return the file of the tuning measured on a card: "nvidia-h200.json" for "NVIDIA H200"."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-') or 'unknown'}.json"


def read_tuning(path: str | Path) -> Tuning:
    """Return the tuning that a file holds for a card. Raises `BackendError` naming what is wrong with it."""
    try:
        content = outside.read(path)
        document = json.loads(content)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"it is not a tuning of format {FORMAT}")
        latent, expanded = _tiles(document["latent"]), _tiles(document["expanded"])
        where = ", ".join(str(document[key]) for key in ("card", "date") if document.get(key))
        where = shortened(escaped(where))
        source = f"{Path(path).name}: {where or 'of an unknown card'} (crc32 {zlib.crc32(content):08x})"
        return Tuning(latent, expanded, source)
    except OSError as error:
        why = error.strerror or error
        raise BackendError(f"the tuning file {path} cannot be read: {why}. {CURE}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        what = shortened(escaped(what))
        raise BackendError(f"the tuning file {path} cannot be used: {what}. {CURE}") from error


def write_tuning(path: str | Path, tuning: Tuning, facts: Mapping[str, str]) -> None:
    """Write a tuning for `read_tuning`; `facts` say where it was measured: card, torch, triton, date.

    Raises OSError.
    """
    tiles = {name: _rows(getattr(tuning, name)) for name in ("latent", "expanded")}
    Path(path).write_text(json.dumps({"format": FORMAT, **facts, **tiles}, indent=2) + "\n", encoding="utf-8")


def _tiles(rows: Any) -> dict[int, Tile]:
    return {row["from"]: Tile(**{key: value for key, value in row.items() if key != "from"}) for row in rows}


def _rows(tiles: Tiles) -> list[dict[str, Any]]:
    return [{"from": least, **asdict(tile)} for least, tile in sorted(tiles.items())]
