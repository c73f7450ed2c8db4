"""Mistakes in what both attention kernels use."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_softmax = partial(Mutant, room="shared")
_places = partial(Mutant, room="shared")

SOFTMAX = (
    _softmax(
        "exponentials are natural",
        old="weight = tl.math.exp2(score - base[:, None])",
        new="weight = tl.exp(score - base[:, None])",
    ),
    _softmax(
        "the maximum is lost",
        old="weight = tl.math.exp2(score - base[:, None])",
        new="weight = tl.math.exp2(score)",
    ),
    _softmax(
        "the maximum of earlier steps is lost",
        old="higher = tl.maximum(top, tl.max(score, 1))",
        new="higher = tl.max(score, 1)",
    ),
    _softmax("sums of earlier steps do not shrink", old="total * shrink + tl.sum", new="total + tl.sum"),
    _softmax(
        "infinity minus infinity",
        old='base = tl.where(higher == float("-inf"), 0.0, higher)',
        new="base = higher",
    ),
    _softmax(
        "rows that see nothing divide by zero", old="whole = tl.where(some, total, 1.0)", new="whole = total"
    ),
)
PLACES = (
    _places("the search ends a request early", old="high - low > 1", new="high - low > 2"),
    _places("a request begins one program late", old="rows, GAP) <= place", new="rows, GAP) < place"),
    _places(
        "requests begin where the rows before them end",
        old="rows).to(tl.int32) + request * GAP",
        new="rows).to(tl.int32)",
    ),
    _places(
        "blocks of a request are numbered from the first of all",
        old="program - begin(cu_q, request, HEADS, rows, 1)",
        new="program",
    ),
    _places(
        "requests and blocks are mixed up", old="program // blocks, program", new="program % blocks, program"
    ),
)
