"""Mistakes in what both attention kernels use."""

from mutating import mistakes

SOFTMAX = mistakes(
    "shared",
    {
        "exponentials are natural": (
            "weight = tl.math.exp2(score - base[:, None])",
            "weight = tl.exp(score - base[:, None])",
        ),
        "the maximum is lost": (
            "weight = tl.math.exp2(score - base[:, None])",
            "weight = tl.math.exp2(score)",
        ),
        "the maximum of earlier steps is lost": (
            "higher = tl.maximum(top, tl.max(score, 1))",
            "higher = tl.max(score, 1)",
        ),
        "sums of earlier steps do not shrink": ("total * shrink + tl.sum", "total + tl.sum"),
        "infinity minus infinity": ('base = tl.where(higher == float("-inf"), 0.0, higher)', "base = higher"),
        "rows that see nothing divide by zero": ("whole = tl.where(some, total, 1.0)", "whole = total"),
    },
)
PLACES = mistakes(
    "shared",
    {
        "the search ends a request early": ("high - low > 1", "high - low > 2"),
        "a request begins one program late": ("rows, GAP) <= place", "rows, GAP) < place"),
        "requests begin where the rows before them end": (
            "rows).to(tl.int32) + request * GAP",
            "rows).to(tl.int32)",
        ),
        "blocks of a request are numbered from the first of all": (
            "program - begin(cu_q, request, HEADS, rows, 1)",
            "program",
        ),
        "requests and blocks are mixed up": ("program // blocks, program", "program % blocks, program"),
    },
)
