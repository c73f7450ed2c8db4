"""`Share`: which tokens of a request are on which rank, and how many of its first ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
