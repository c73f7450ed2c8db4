"""Work: FLOPs and bytes."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """What a computation needs: FLOPs, a multiply-add being 2, and bytes that must move at least once."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]  # a sum, not a longer tuple
        return Work(self.flops + other.flops, self.bytes + other.bytes)
