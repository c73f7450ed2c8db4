"""`Layout`: what is split over ranks, and which part each has; `Share`: which tokens it has. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla.config import MLAConfig
from mla.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True)
class Share:
    """The tokens i of every request with i // interleave mod world == rank."""

    rank: int
    world: int
    interleave: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or self.interleave < 1:
            raise ValueError(
                f"no share has rank {self.rank} of {self.world} with runs of {self.interleave} tokens."
            )

    def owned(self, positions: torch.Tensor) -> torch.Tensor:
        """Return, for positions [T], whether each is on this rank."""
        return positions.div(self.interleave, rounding_mode="floor").remainder(self.world) == self.rank

    def count(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return, for lengths [T], how many of so many first tokens are on this rank."""
        turns = lengths.div(self.world * self.interleave, rounding_mode="floor")
        rest = lengths.remainder(self.world * self.interleave) - self.rank * self.interleave
        return turns * self.interleave + rest.clamp(0, self.interleave)

    def owns(self, position: int) -> bool:
        """Return whether the token at a position is on this rank."""
        return position // self.interleave % self.world == self.rank

    def held(self, length: int) -> int:
        """Return how many of the first `length` tokens are on this rank."""
        turns, rest = divmod(length, self.world * self.interleave)
        return turns * self.interleave + min(max(rest - self.rank * self.interleave, 0), self.interleave)

    def first(self, length: int) -> int:
        """Return how many of the first `length` tokens are on rank 0: the most that any rank has."""
        turns, rest = divmod(length, self.world * self.interleave)
        return turns * self.interleave + min(rest, self.interleave)
