"""Records of `transformers` with and without our ops, as JSON: what was measured, each party at its best.

The program that wrote them is gone: `layers` runs in the one benchmark instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from mla.bench.results.stats import median
from mla.errors import ResultError

LAYERS = {"deepseek-r1": 61, "deepseek-v2-lite": 27}  # of each config's model, all with MLA


class Row(msgspec.Struct, kw_only=True):
    """One side, in one setting of the host's allocator, in one phase at one length."""

    config: str
    phase: str  # decode, append or prefill
    history: int  # cached tokens before the forward
    new_tokens: int
    requests: int = 1
    side: str  # sdpa or eager of `transformers`; mla, mla-paged
    dtype: str
    allocator: str = "default"  # or kept: freed memory stays in the process
    model_ms: list[list[float]] = []  # of each round
    attention_ms: list[list[float]] = []
    weight_bytes: int = 0  # of the attention layer, packed ones too
    cache_bytes: int = 0  # of the latents after the forward, in whole pages where there are any
    transient_bytes: int = 0  # at most, during one forward, beyond weights and the history's cache
    # Relative, of last tokens' attention from that of the first side of `transformers`; None: not compared.
    deviation: float | None = None
    load: float = 0.0  # of the machine: processes that ran or waited, over the last minute
    left_out: str = ""  # why there is no number

    def needed_bytes(self, layers: int) -> int:
        """Return what so many attention layers need at once, at most: while the last of them runs.

        Weights and caches are there for every layer, and the transient memory of a forward once. Of the layer
        that runs, the cache's growth is part of that.
        """
        before = self.cache_bytes * self.history // self.tokens
        return layers * self.weight_bytes + (layers - 1) * self.cache_bytes + before + self.transient_bytes

    @property
    def tokens(self) -> int:
        """All tokens of a request after the forward."""
        return self.history + self.new_tokens


class Record(msgspec.Struct, kw_only=True):
    """A run."""

    device: str
    label: str = ""  # of the machine in headings, where another one's tables have none
    threads: int
    backend: str
    versions: dict[str, str]
    commit: str | None
    environment: dict[str, str] = {}  # what else numbers depend on, the backend's own facts among it
    allocators: dict[str, str] = {}  # GLIBC_TUNABLES of each setting
    memory_bytes: int | None  # of the host
    flush: str  # how caches are flushed
    date: str
    arguments: list[str]
    rows: list[Row] = []


def read(path: Path) -> Record:
    """Read a record. Raises `ResultError` for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except OSError as error:
        raise ResultError(f"cannot read '{path}': {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise ResultError(f"'{path}' is not a record of this comparison: {error}.") from error


# ------------------------------------------------------------------------------------- what was measured

STOCK, OURS, PAGED = "transformers", "mla", "mla, PagedCache"
SIDES = {STOCK: ("sdpa", "eager"), OURS: ("mla",), PAGED: ("mla-paged",)}
NAMES = {STOCK: "`transformers`", OURS: "`use_mla`", PAGED: "`PagedCache`"}
Measured = Literal["attention_ms", "model_ms"]


@dataclass(frozen=True)
class Point:
    """One phase at one length: all sides in all settings of the allocator."""

    phase: str
    length: int
    rows: Sequence[Row]

    def best(self, party: str, allocator: str = "") -> Row | None:
        """Return a party's row whose attention is the fastest, in one setting or in any."""
        rows = [row for row in self.rows if row.side in SIDES[party] and row.model_ms]
        among = [row for row in rows if row.allocator == allocator or not allocator]
        return min(among, key=attention, default=None)

    def ratio(self, party: str, measured: Measured = "attention_ms", allocator: str = "") -> float | None:
        """Return how many times as fast as `transformers` a party is, each at its best."""
        stock, ours = self.best(STOCK, allocator), self.best(party, allocator)
        return None if stock is None or ours is None else middle(stock, measured) / middle(ours, measured)

    def lightest(self, party: str, layers: int = 1) -> Row | None:
        """Return a party's row that needs the least memory for so many layers, however slow it is."""
        rows = [row for row in self.rows if row.side in SIDES[party] and row.transient_bytes]
        return min(rows, key=lambda row: row.needed_bytes(layers), default=None)

    def needed(self, party: str, layers: int) -> int | None:
        """Return the bytes that so many attention layers of a party need, at the least."""
        row = self.lightest(party, layers)
        return None if row is None else row.needed_bytes(layers)

    @property
    def why_not(self) -> str:
        """Why `transformers` has no number; "" if it has one."""
        reasons = [row.left_out for row in self.rows if row.side in SIDES[STOCK] and row.left_out]
        return (
            ""
            if self.best(STOCK)
            else next((reason for reason in reasons if "GiB" in reason), "; ".join(reasons[:1]))
        )


@dataclass(frozen=True)
class Group:
    """All points of one config and as many requests."""

    config: str
    requests: int
    points: Sequence[Point]
    label: str = ""  # of the machine

    @property
    def title(self) -> str:
        """What tables are headed with."""
        several = f"{self.requests} requests" if self.requests > 1 else ""
        return ", ".join(filter(None, (self.config, self.label, several)))

    @property
    def layers(self) -> int:
        """The layers of the config's model."""
        return LAYERS[self.config]

    @property
    def allocators(self) -> list[str]:
        """The settings of the allocator."""
        return sorted({row.allocator for point in self.points for row in point.rows})

    def of(self, phase: str) -> list[Point]:
        """Return one phase."""
        return [point for point in self.points if point.phase == phase]


def groups(rows: Iterable[Row], label: str = "") -> list[Group]:
    """Return what was measured, in its order; `label` is the machine's."""
    by_config: dict[tuple[str, int], dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        points = by_config.setdefault((row.config, row.requests), {})
        points.setdefault((row.phase, row.history or row.new_tokens), []).append(row)
    return [
        Group(config, requests, [Point(*place, rows_there) for place, rows_there in points.items()], label)
        for (config, requests), points in by_config.items()
    ]


def middle(row: Row, measured: Measured) -> float:
    """Return the median of the medians of rounds."""
    return median([median(samples) for samples in getattr(row, measured)])


def attention(row: Row) -> float:
    """Return the ms of attention alone."""
    return middle(row, "attention_ms")
