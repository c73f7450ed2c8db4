"""What `--only` names, checks, checks of one subject, and single cases of one; what `--list`
prints, and the file of expected failures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mla.command.console import out
from mla.command.exit_codes import Exit
from mla.conformance.registry import KINDS, LAYER, OP, all_checks, matches
from mla.errors import UsageError, did_you_mean
from mla_backends import outside
from mla_backends.outside import quoted

if TYPE_CHECKING:
    from mla.conformance.trial import Trial

Numbers = frozenset[int] | None  # of cases, from 1; None: all
MARK = "#"  # between the id of a check and the number of a case


def case_id(instance_id: str, number: int) -> str:
    """Return the id of a case; that of the check as a whole has no number."""
    return f"{instance_id}{MARK}{number}" if number else instance_id


def without_case(pattern: str) -> str:
    """Return a pattern without the number of a case; the name of an op may hold the mark, too."""
    at = pattern.find(MARK, pattern.rfind("]") + 1)
    return pattern if at < 0 else pattern[:at]


def split(pattern: str) -> tuple[str, int | None]:
    """Return what names a check, and the number of the case if there is one. Raises `UsageError`."""
    check = without_case(pattern)
    number = pattern[len(check) + 1 :]
    if check == pattern:
        return check, None
    if check and re.fullmatch("0*[1-9][0-9]{0,8}", number):
        return check, int(number)
    raise UsageError(f"'{pattern}': a case is named by its number, as in 'latent.tiles[my_op-bfloat16]#3'.")


def chosen_cases(patterns: Sequence[str], check_id: str, subject: str) -> Numbers:
    """Return the cases of a check that the patterns name; none if it is not named at all."""
    numbers = {number for check, number in map(split, patterns) if matches(check, check_id, subject)}
    if not patterns or None in numbers:
        return None
    return frozenset(number for number in numbers if number is not None)


def require_cases(planned: Iterable[Trial]) -> None:
    """Raise `UsageError` unless every check has the cases that were chosen of it."""
    for trial in (trial for trial in planned if trial.chosen):
        count, missing = max(1, len(trial.all_labels())), max(trial.chosen or ())
        if missing > count:
            cases = f"{count} cases" if count > 1 else "one case"
            raise UsageError(f"there is no case '{case_id(trial.id, missing)}': {trial.id} has {cases}.")


def require_known(pattern: str, where: str) -> None:
    """Raise `UsageError` unless some check matches the pattern, whatever the subject."""
    check, names = pattern.partition("[")[0], [known.id for known in all_checks()]
    if not any(matches(check, name) for name in names):
        hint = did_you_mean(check, [*names, *dict.fromkeys(name.partition(".")[0] for name in names)])
        raise UsageError(f"{where}: unknown check {quoted(check)}.{hint} `--list` shows all checks.")


def nothing_matches(patterns: Sequence[str], ids: Sequence[str]) -> UsageError:
    """Return the error of patterns that match no check of a backend, whose ids are given."""
    check = split(patterns[0])[0]
    hint = did_you_mean(check, ids) if len(patterns) == 1 and "*" not in check else ""
    return UsageError(f"no check of this backend matches --only {' '.join(patterns)}.{hint}")


def list_checks(only: Sequence[str]) -> Exit:
    """Print id, kind, description and bug of every check, and how many there are of each kind.

    Raises `UsageError` for a single case: only a backend's ops have cases.
    """
    for pattern in only:
        if split(pattern)[1] is not None:
            raise UsageError(f"'{pattern}' is a case; --list shows cases with --backend alone.")
    names = [pattern.partition("[")[0] for pattern in only or ["*"]]
    listed = [check for check in all_checks() if any(matches(name, check.id) for name in names)]
    for check in listed:
        out(f"{check.id} ({check.fails})\n  {check.description}\n  Catches {check.catches}.\n")
    counts = [(kind, sum(check.fails == kind for check in listed)) for kind in KINDS]
    of_kinds = ", ".join(f"{count} {kind}" for kind, count in counts if count)
    out(f"{len(listed)} check{'s' * (len(listed) != 1)}: {of_kinds}\n")
    return Exit.OK


def list_cases(planned: Sequence[Trial]) -> Exit:
    """Print the id of every case of what would run."""
    count = 0
    for trial in planned:
        of_ops = trial.check.scope in (OP, LAYER)  # the cases of others are known when they have run
        labels = enumerate(trial.all_labels() if of_ops else (), 1)
        listed = [
            (number, label) for number, label in labels if trial.chosen is None or number in trial.chosen
        ]
        out(f"{trial.id} ({trial.check.fails})\n")
        for number, label in listed:
            out(f"  {case_id(trial.id, number)}  {label}\n")
        count += max(1, len(listed))
    out(f"{len(planned)} checks, {count} cases\n")
    return Exit.OK


# ----------------------------------------------------------------------- expected failures


@dataclass
class Xfails:
    """Expected failures: pattern -> reason. Remembers which ones were used.

    A file has lines `check: reason`, where a check is named as for `--only`. Empty lines and lines that start
    with # are ignored.
    """

    entries: Mapping[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Xfails:
        """Read a file. Raises `UsageError` naming the line."""
        try:
            lines = outside.read(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}.") from error
        entries: dict[str, str] = {}
        for number, line in enumerate(map(str.strip, lines), 1):
            if line and not line.startswith("#"):
                where = f"'{path}' line {number}"
                pattern, _, reason = map(str.strip, line.partition(":"))
                if not pattern or not reason:
                    raise UsageError(f"{where}: expected 'check: reason', got {quoted(line)}.")
                if (check := without_case(pattern)) != pattern:
                    hint = f"list {quoted(check)}"
                    raise UsageError(f"{where}: expected failures are checks, not single cases: {hint}.")
                require_known(pattern, where)
                if pattern in entries:
                    raise UsageError(f"{where}: {quoted(pattern)} is listed twice.")
                entries[pattern] = reason
        return cls(entries)

    def reason(self, check_id: str, subject: str) -> str | None:
        """Return why this check is expected to fail, or None."""
        pattern = next((entry for entry in self.entries if matches(entry, check_id, subject)), None)
        self.used.update(filter(None, [pattern]))
        return None if pattern is None else self.entries[pattern]

    def unused(self) -> list[str]:
        """Return the patterns that matched nothing that ran."""
        return [pattern for pattern in self.entries if pattern not in self.used]
