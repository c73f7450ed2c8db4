"""The list of expected failures: lines `check: reason`, where a check is named as for `--only`.

Empty lines and lines that start with # are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mla.conformance.registry import matches
from mla.conformance.selection import require_known, without_case
from mla.errors import MLAError
from mla_backends import outside
from mla_backends.outside import quoted


class XfailError(MLAError):
    """A list of expected failures that cannot be read."""


@dataclass
class Xfails:
    """Expected failures: pattern -> reason. Remembers which ones were used."""

    entries: Mapping[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Xfails:
        """Read a file. Raises `XfailError` or `UsageError` naming the line."""
        try:
            lines = outside.read(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise XfailError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}.") from error
        entries: dict[str, str] = {}
        for number, line in enumerate(map(str.strip, lines), 1):
            if line and not line.startswith("#"):
                where = f"'{path}' line {number}"
                pattern, _, reason = map(str.strip, line.partition(":"))
                if not pattern or not reason:
                    raise XfailError(f"{where}: expected 'check: reason', got {quoted(line)}.")
                if (check := without_case(pattern)) != pattern:
                    hint = f"list {quoted(check)}"
                    raise XfailError(f"{where}: expected failures are checks, not single cases: {hint}.")
                require_known(pattern, where)
                if pattern in entries:
                    raise XfailError(f"{where}: {quoted(pattern)} is listed twice.")
                entries[pattern] = reason
        return cls(entries)

    def reason(self, check_id: str, subject: str) -> str | None:
        """Return why this check is expected to fail, or None."""
        pattern = next((one for one in self.entries if matches(one, check_id, subject)), None)
        self.used.update(filter(None, [pattern]))
        return None if pattern is None else self.entries[pattern]

    def unused(self) -> list[str]:
        """Return the patterns that matched nothing that ran."""
        return [pattern for pattern in self.entries if pattern not in self.used]
