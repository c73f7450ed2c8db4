"""What ends a run over several ranks."""

from __future__ import annotations

from mla.errors import MLAError


class RanksError(MLAError):
    """Ranks that do not find each other, or do not agree."""

    exit_code = 3

    def __init__(self, sentence: str, common: bool = False) -> None:
        """`common`: every rank meets it, and rank 0 says it for all."""
        super().__init__(sentence)
        self.common = common


class RankLost(MLAError):
    """Another rank is gone, or has failed. Rank 0 says so for all; others only what it cannot say."""

    def __init__(self, reason: str, code: int, by: int | None = None) -> None:
        """`by`: the rank that has said itself why it ends; None where one is gone without a word."""
        super().__init__(f"{reason.rstrip('.')}.")
        self.exit_code = code
        self.common = by is not None
