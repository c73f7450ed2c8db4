"""What a run covered, by why kernels fail, and what it cannot have seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mla.conformance.kinds import KINDS
from mla.conformance.report import Cases, CheckResult, Coverage, Slow

# What no run of this suite sees.
_ALWAYS = (
    "Sizes between those tried: cases are neighbours of the borders that kernels usually have.",
    "Races that need luck: a case runs once or a few times, on one stream of one process.",
    "One more rounding to a narrow dtype in a small op, of angles, of a norm before its weight, of a product "
    "before its bias: it costs about as much as rounding the output, which is allowed.",
    "Speed: nothing is timed but whether the device waits and its clock tells the truth.",
    "Several devices, and what `probe()` does to a device: it is set up before the first check.",
)


def coverage(checks: Sequence[CheckResult]) -> list[Coverage]:
    """Return how much ran of every kind, in the order of `KINDS`."""
    return [_of_kind(kind, [one for one in checks if one.kind == kind]) for kind in KINDS]


def _of_kind(kind: str, members: Sequence[CheckResult]) -> Coverage:
    counts = {name: sum(getattr(one.cases, name) for one in members) for name in Cases.__struct_fields__}
    return Coverage(kind=kind, what=KINDS[kind], checks=len(members), cases=Cases(**counts))


@dataclass(frozen=True)
class Extent:
    """How far a run went."""

    quick: bool
    only: Sequence[str]  # patterns; empty: every check
    claimed: Sequence[str]  # dtypes
    checked: Sequence[str]
    slow: Sequence[Slow]
    planned: int  # checks


def blind(extent: Extent, checks: Sequence[CheckResult]) -> list[str]:
    """Return what a run cannot have seen, one sentence each; what depends on the run comes first."""
    cut = [*_cut(extent, checks), *_thinned(extent, checks)]
    return [*cut, *_reached(checks), *_refused(checks), *_dtypes(extent), *_ALWAYS]


def _cut(extent: Extent, checks: Sequence[CheckResult]) -> Iterator[str]:
    if len(checks) < extent.planned:
        missing = extent.planned - len(checks)
        yield f"What {missing} of {extent.planned} checks ask: the run ended before them."
    if extent.only:
        yield f"What other checks ask: only {', '.join(extent.only)} ran."
    if extent.quick:
        yield "Many sizes: the quick grid has a few of each kind, the full one (without --quick) all."


def _thinned(extent: Extent, checks: Sequence[CheckResult]) -> Iterator[str]:
    for one in extent.slow:
        members = [check.cases for check in checks if check.dtype == one.dtype]
        ran = sum(cases.passed + cases.refused + cases.failed for cases in members)
        whole = ran + sum(cases.left_out for cases in members)
        if ran < whole:
            yield (
                f"Most sizes in {one.dtype}: it takes {_times(one.factor)} as long as {one.than} here, "
                f"so that {ran} of {whole} cases ran (--every-case runs them all)."
            )


def _times(factor: float) -> str:
    return f"{factor:.2g} times" if factor < 10 else f"{factor:.0f} times"


def _reached(checks: Sequence[CheckResult]) -> Iterator[str]:
    """Say how far checks of index widths got, as memory allowed."""
    members = [one for one in checks if one.kind == "index" and one.note and one.cases.passed]
    for check in dict.fromkeys(one.check for one in members):
        notes = dict.fromkeys(one.note for one in members if one.check == check)
        yield f"Indices beyond what {check} reached: {', '.join(notes)}."


def _refused(checks: Sequence[CheckResult]) -> Iterator[str]:
    """Say which ops refused a dtype as a whole, and which kinds of failure in what they serve."""
    served: dict[tuple[str, str], dict[str, bool]] = {}
    for one in checks:
        kinds = served.setdefault((one.dtype, one.of or "the device"), {})
        kinds[one.kind] = kinds.get(one.kind, False) or one.status != "refused"
    subjects: dict[tuple[str, str], list[str]] = {}
    for (dtype, of), kinds in served.items():
        none = [kind for kind, some in kinds.items() if not some]
        if none:
            what = "Anything" if len(none) == len(kinds) else f"What fails by {' or '.join(none)}"
            subjects.setdefault((what, f" in {dtype}" if dtype else ""), []).append(of)
    for (what, where), names in subjects.items():
        yield f"{what}{where} of {', '.join(names)}: all of it was refused."


def _dtypes(extent: Extent) -> Iterator[str]:
    unchecked = [dtype for dtype in extent.claimed if dtype not in extent.checked]
    if unchecked:
        yield f"{' and '.join(unchecked)}: claimed, and not asked for."
    yield f"Other dtypes than {', '.join(extent.claimed)}: the backend claims no others."
