"""How one call of a command ended, in this process or in one of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Exit code and streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, which says what went wrong."""
        return self.err.splitlines()[-1] if self.err else ""
