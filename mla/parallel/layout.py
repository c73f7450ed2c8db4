"""`Layout`: what is split over ranks, and which part each rank has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mla.config import MLAConfig
from mla.errors import UsageError, did_you_mean

AXES = ("dp", "tp", "dcp")
MOST = 4096  # larger sizes are typos


@dataclass(frozen=True)
class Place:
    """One rank's coordinates."""

    dp: int
    tp: int
    dcp: int


@dataclass(frozen=True)
class Layout:
    """How many ways each thing is split; `world` ranks in all.

    `tp` splits heads: each rank has the weights of its own, and the whole latent cache.
    `dcp` splits the tokens of every request, interleaved, and the weights of heads as well: queries are
    gathered, each rank attends its tokens for the heads of all, and partial results are merged. `dp` splits
    requests, with all weights on every one of its parts.

    Ranks of one `dcp` group are neighbours, since they talk most; those of one `dp` part lie together.
    """

    tp: int = 1
    dp: int = 1
    dcp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if not 1 <= getattr(self, axis) <= MOST:
                raise UsageError(f"{axis} must be between 1 and {MOST}, got {getattr(self, axis)}.")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read "tp=2,dcp=2". Raises `UsageError`."""
        sizes: dict[str, int] = {}
        for word in text.split(","):
            found = re.fullmatch(r"\s*([a-z]+)=([0-9]{1,6})\s*", word)
            if found is None:
                raise UsageError(f"a layout is written as in 'tp=2,dcp=2', got '{text}'.")
            axis = found[1]
            if axis not in AXES:
                hint = did_you_mean(axis, AXES)
                raise UsageError(f"layout '{text}': unknown axis '{axis}'.{hint} Axes: {', '.join(AXES)}.")
            if axis in sizes:
                raise UsageError(f"layout '{text}': {axis} is given twice.")
            sizes[axis] = int(found[2])
        return cls(**sizes)

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(named) or "tp=1"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.dcp

    @property
    def head_parts(self) -> int:
        """Number of parts that the weights of heads are split into."""
        return self.tp * self.dcp

    def place(self, rank: int) -> Place:
        """Return where a rank is. Raises ValueError unless it is one of the world's."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not one of the {self.world} ranks of layout '{self}'.")
        return Place(rank // self.head_parts, rank % self.head_parts // self.dcp, rank % self.dcp)

    def head_part(self, rank: int) -> int:
        """Return which part of the heads' weights a rank has."""
        return rank % self.head_parts

    def head_groups(self) -> list[list[int]]:
        """Return the ranks that together have all heads, group by group."""
        size = self.head_parts
        return [list(range(first, first + size)) for first in range(0, self.world, size)]

    def context_groups(self) -> list[list[int]]:
        """Return the ranks that together have all tokens of a request, group by group."""
        return [list(range(first, first + self.dcp)) for first in range(0, self.world, self.dcp)]

    def check(self, config: MLAConfig) -> None:
        """Raise `UsageError` unless the heads of `config` can be split this way."""
        if config.num_attention_heads % self.head_parts:
            raise UsageError(
                f"layout '{self}' splits heads over {self.head_parts} ranks, and config '{config.name}' has "
                f"{config.num_attention_heads}: choose a layout whose tp x dcp divides them."
            )
