"""What `--only` names: checks, checks of one subject, and single cases of one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mla.conformance.registry import matches
from mla.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from mla.conformance.suite import Instance
    from mla.conformance.trial import BackendUnderTest

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
    if check == pattern:
        return pattern, None
    number = pattern[len(check) + 1 :]
    if not (check and re.fullmatch("0*[1-9][0-9]{0,8}", number)):
        raise UsageError(
            f"'{pattern}': a case is named by its number, as in 'latent.heads[my_op-bfloat16]#3'."
        )
    return check, int(number)


def chosen_cases(patterns: Sequence[str], check_id: str, subject: str) -> Numbers:
    """Return the cases of a check that the patterns name; none if it is not named at all."""
    if not patterns:
        return None
    found = [number for check, number in map(split, patterns) if matches(check, check_id, subject)]
    numbers = frozenset(number for number in found if number is not None)
    return numbers if len(numbers) == len(set(found)) else None


def require_cases(planned: Iterable[Instance], subject: BackendUnderTest) -> None:
    """Raise `UsageError` unless every check has the cases that were chosen of it."""
    for one in planned:
        if one.chosen is None:
            continue
        count = max(1, len(one.labels(subject)))
        missing = max(one.chosen)
        if missing > count:
            cases = f"{count} cases" if count > 1 else "one case"
            grid = "quick" if subject.quick else "full"
            raise UsageError(
                f"there is no case '{case_id(one.id, missing)}': in the {grid} grid {one.id} has {cases}."
            )


def nothing_matches(patterns: Sequence[str], ids: Sequence[str]) -> UsageError:
    """Return the error of patterns that match no check of a backend, whose ids are given."""
    checks = [split(pattern)[0] for pattern in patterns]
    hint = did_you_mean(checks[0], ids) if len(checks) == 1 and "*" not in checks[0] else ""
    return UsageError(f"no check of this backend matches --only {' '.join(patterns)}.{hint}")
