"""Attention where requests are sorted, grouped or permuted: each must get its own rows back."""

from __future__ import annotations

from mla.conformance.checks.attention.common import (
    expanded_check,
    latent_check,
)
from mla.conformance.problems.attention import AttentionProblem, Lengths
from mla.conformance.problems.attention_call import check_out
from mla.conformance.trial import Trial

KIND = "order"
# Equal requests, and pairs of equal ones between others.
EQUAL: tuple[tuple[Lengths, Lengths], ...] = (
    ((1,) * 40, (70,) * 40),
    ((3,) * 6, (66,) * 6),
    ((1, 2, 1, 2, 1, 2), (9, 9, 9, 9, 65, 65)),
)
# New tokens and keys of requests that are handed over in several orders.
PAIRS = ((1, 3), (5, 5), (2, 70), (1, 64), (1, 130), (9, 20), (1, 3), (2, 65))


def orders() -> tuple[tuple[Lengths, Lengths], ...]:
    """Return the same requests as they come, by their keys, the other way round, and by their new tokens."""
    by_keys = sorted(PAIRS, key=lambda pair: pair[1])
    found = (PAIRS, tuple(by_keys), tuple(by_keys[::-1]), tuple(sorted(PAIRS)), tuple(sorted(PAIRS))[::-1])
    return tuple((tuple(new for new, _ in pairs), tuple(all for _, all in pairs)) for pairs in found)


def problems(absorbed: bool, lengths: tuple[tuple[Lengths, Lengths], ...]) -> list[AttentionProblem]:
    """Return one problem of few heads per batch."""
    return [AttentionProblem(absorbed, *both, heads=4) for both in lengths]


@latent_check("equal", "requests of equal length that change places when they are sorted", KIND)
def equal(trial: Trial) -> None:
    """Requests of the same lengths keep their own rows."""
    check_out(trial, *problems(True, EQUAL))


@latent_check(
    "permuted",
    "rows that come back sorted, or a plan that is kept for the same requests in another order",
    KIND,
)
def permuted(trial: Trial) -> None:
    """The same requests in another order give the same rows in that order."""
    check_out(trial, *problems(True, orders()))


@expanded_check("equal", "segments of equal length that change places when they are sorted", KIND)
def expanded_equal(trial: Trial) -> None:
    """Segments of the same lengths keep their own rows."""
    check_out(trial, *problems(False, EQUAL))


@expanded_check(
    "permuted",
    "rows that come back sorted, or a plan that is kept for the same segments in another order",
    KIND,
)
def expanded_permuted(trial: Trial) -> None:
    """The same segments in another order give the same rows in that order."""
    check_out(trial, *problems(False, orders()))
