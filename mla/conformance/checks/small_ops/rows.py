"""Small ops: how many rows and heads a call has, from none to more than a launch grid counts."""

from __future__ import annotations

from mla.conformance.checks.small_ops.kinds import both_ways, by_turns, other_way, small_check, vary
from mla.conformance.problems.small_call import check_small
from mla.conformance.problems.small_ops import MatMul, SmallProblem
from mla.conformance.trial import Trial

# Rows that are drawn; a prime, so that no tile divides them. A kernel that is wrong from any row on up to it
# is wrong here, whatever the number was.
DRAWN = 5003
# Every rest of small tiles; then beside powers of two, which sizes of blocks and their multiples are.
FEW = (*range(1, 34), 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2049)
MANY = tuple(sorted({*range(1, 130), *FEW, 2047, 2048, 3000, 4095, 4096, 4097}))
# More than the 65535 blocks that a grid's second and third dimension may have.
BEYOND_GRID = 66_001


@small_check("rows", catches="rows beyond a launch grid, or beside a multiple of its blocks", fails="grid")
def rows(trial: Trial, example: SmallProblem) -> None:
    """From one row to thousands, every row is right."""
    counts = (*FEW, DRAWN) if trial.quick else (*MANY, DRAWN, BEYOND_GRID)
    check_small(trial, *by_turns(*(vary(example, tokens=tokens, drawn=DRAWN) for tokens in counts)))


@small_check(
    "rows_and_heads",
    catches="tokens times heads that a launch grid does not hold",
    fails="grid",
    kinds=("batched_linear", "rotate_query"),
)
def rows_and_heads(trial: Trial, example: SmallProblem) -> None:
    """Tokens times heads may exceed 65535."""
    heads = (
        {"groups": 128, "outputs": 64 if trial.quick else 128}
        if isinstance(example, MatMul)
        else {"heads": 128}
    )
    problem = vary(example, tokens=521, drawn=61, **heads)
    check_small(trial, *([other_way(problem)] if trial.quick else both_ways(problem)))


@small_check("empty", catches="an empty launch that raises, or that writes anyway", fails="emptiness")
def empty(trial: Trial, example: SmallProblem) -> None:
    """A call without tokens is allowed and writes nothing."""
    nothing = vary(example, tokens=0)
    check_small(trial, *both_ways(nothing))
    check_small(trial, nothing, strided=True)
