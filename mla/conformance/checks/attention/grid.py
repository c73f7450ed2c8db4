"""Attention over many requests, segments and rows: what a launch grid or a table of fixed size runs out of.

Lengths differ within a batch, as do those of neighbours, and hold no more keys than it takes.
"""

from __future__ import annotations

from mla.conformance.checks.attention.common import (
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
)
from mla.conformance.problems.attention import AttentionProblem, Lengths
from mla.conformance.problems.attention_call import check_out
from mla.conformance.trial import Trial

KIND = "grid"
# Requests of one new token, and of several. Beyond 256, 512 and 1024: threads of a block, of which each may
# plan a request. Beyond 4096: more than a planner may have memory for.
REQUESTS, MOST_REQUESTS = (520, 300), (4200, 1100)
# The same of one new token with as many heads as models have.
REQUESTS_OF = ((16, 300), (128, 140))
# Requests, new tokens of each and heads: more than 1024 tokens and 4096 rows (a head of a token each), ...
ROWS = ((40, 33, 4),)
# ... the same in one request, more than 4096 tokens, and more than 2^16 rows.
MOST_ROWS = (*ROWS, (1, 1100, 4), (2, 2100, 1), (5, 120, 112))


def ragged(count: int, most: int) -> Lengths:
    """Return `count` lengths from 1 to `most`, none in order."""
    return tuple(1 + (7 * i + i // 3) % most for i in range(count))


def of_several(count: int, most: int) -> tuple[Lengths, Lengths]:
    """Return lengths of queries, 1 to 3, and of keys: `most` more at most."""
    queries = ragged(count, 3)
    return queries, tuple(new + more - 1 for new, more in zip(queries, ragged(count, most), strict=True))


@latent_check("requests", "a table of a fixed number of requests, or a grid that ends early", KIND)
def requests(trial: Trial) -> None:
    """Hundreds of short requests are attended, each by its own row of the tables."""
    single, several = REQUESTS if trial.quick else MOST_REQUESTS
    check_out(trial, decode(*ragged(single, 9), heads=2), latent(*of_several(several, 5), heads=2))
    for heads, count in REQUESTS_OF[: 1 if trial.quick else None]:
        check_out(trial, latent(*of_several(count, 5), heads=heads))


@latent_check("rows", "rows beyond the last of a grid, or a number of them that is too narrow", KIND)
def rows(trial: Trial) -> None:
    """Thousands of rows are attended, in one request and in many."""
    check_out(trial, *(_many_rows(True, *rows) for rows in (ROWS if trial.quick else MOST_ROWS)))


@expanded_check("segments", "a table of a fixed number of segments, or a grid that ends early", KIND)
def segments(trial: Trial) -> None:
    """Hundreds of short segments are attended, with and without a mask."""
    for count in REQUESTS if trial.quick else MOST_REQUESTS:
        lengths = of_several(count, 5)
        both = (True, False) if count == REQUESTS[-1] or not trial.quick else (True,)
        check_out(trial, *(expanded(*lengths, heads=2, causal=causal) for causal in both))
    for heads, count in REQUESTS_OF[: 1 if trial.quick else None]:
        check_out(trial, expanded(*of_several(count, 5), heads=heads))


@expanded_check("rows", "rows beyond the last of a grid, or a number of them that is too narrow", KIND)
def expanded_rows(trial: Trial) -> None:
    """Thousands of rows are attended, in one segment and in many."""
    check_out(trial, *(_many_rows(False, *rows) for rows in (ROWS if trial.quick else MOST_ROWS)))


def _many_rows(absorbed: bool, requests: int, tokens: int, heads: int) -> AttentionProblem:
    """Return requests of so many tokens, the first of them without history."""
    keys = tuple(tokens + i % 9 for i in range(requests))
    return AttentionProblem(absorbed, (tokens,) * requests, keys, heads=heads)
