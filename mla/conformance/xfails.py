"""The list of expected failures: lines `check: reason`.

A check is named as for `--only`: `latent.heads`, `latent.heads[mine-bfloat16]`, `latent`, with wildcards.
Empty lines and lines that start with # are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mla.conformance.registry import all_checks, matches
from mla.conformance.selection import without_case
from mla.errors import MLAError, did_you_mean
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
        """Read a file. Raises `XfailError` naming the line."""
        try:
            lines = outside.read(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise XfailError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}.") from error
        entries: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            pattern, reason = _entry(line, f"'{path}' line {number}")
            if pattern in entries:
                raise XfailError(f"'{path}' line {number}: {quoted(pattern)} is listed twice.")
            entries[pattern] = reason
        return cls(entries)

    def reason(self, check_id: str, subject: str) -> str | None:
        """Return why this check is expected to fail, or None."""
        for pattern, reason in self.entries.items():
            if matches(pattern, check_id, subject):
                self.used.add(pattern)
                return reason
        return None

    def unused(self) -> list[str]:
        """Return the patterns that matched nothing that ran."""
        return [pattern for pattern in self.entries if pattern not in self.used]


def _entry(line: str, where: str) -> tuple[str, str]:
    pattern, colon, reason = (part.strip() for part in line.partition(":"))
    if not colon or not pattern or not reason:
        raise XfailError(f"{where}: expected 'check: reason', got {quoted(line.strip())}.")
    check = without_case(pattern)
    if check != pattern:
        raise XfailError(f"{where}: expected failures are checks, not single cases: list {quoted(check)}.")
    require_known(pattern, where)
    return pattern, reason


def require_known(pattern: str, where: str) -> None:
    """Raise `XfailError` unless some check matches the pattern, whatever the subject."""
    check, _, _ = pattern.partition("[")
    names = [one.id for one in all_checks()]
    if not any(matches(check, name) for name in names):
        groups = list(dict.fromkeys(name.partition(".")[0] for name in names))
        hint = did_you_mean(check, names + groups)
        raise XfailError(f"{where}: unknown check {quoted(check)}.{hint} `--list` shows all checks.")
