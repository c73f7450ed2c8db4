"""The outcome of checking an output."""

from __future__ import annotations

from typing import Literal

import msgspec


class Check(msgspec.Struct, kw_only=True):
    """Outcome of comparing a case with the float64 oracle; one is doubtful that is right in a wrong time."""

    status: Literal["ok", "wrong", "doubtful", "not run"]
    error_ratio: float | None = None  # largest error over its bound; at most 1 when ok
    relative_error: float | None = None  # of the whole output
    reason: str = ""
