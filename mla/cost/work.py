"""Work: FLOPs and bytes."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """What one call of an op needs: every operand moves once."""

    flops: int
    bytes: int
