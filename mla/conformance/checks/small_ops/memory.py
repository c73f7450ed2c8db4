"""Small ops: what lies around operands, and operands that are slices of wider tensors."""

from __future__ import annotations

from collections.abc import Iterator

from mla.conformance.checks.small_ops.kinds import both_ways, small_check, vary
from mla.conformance.problems.small_call import check_small
from mla.conformance.problems.small_ops import LatentWrite, MatMul, Norm, SmallProblem
from mla.conformance.trial import Trial


def _shapes(example: SmallProblem) -> Iterator[SmallProblem]:
    """Yield problems of one token, of few and of many, of even and of odd widths."""
    yield from both_ways(*(vary(example, tokens=tokens) for tokens in (1, 7, 130)))
    if isinstance(example, MatMul):
        yield from (vary(example, tokens=t, inputs=i, outputs=o) for t, i, o in ((130, 96, 70), (5, 33, 17)))
    if isinstance(example, Norm):
        yield from (vary(example, features=width) for width in (1536, 33))
    if isinstance(example, LatentWrite):
        yield vary(example, interleaved=False, page_size=16)


@small_check(
    "strided",
    catches="a kernel that ignores strides, or writes outside its output",
    fails="memory",
)
def strided(trial: Trial, example: SmallProblem) -> None:
    """Operands may be slices of wider tensors; memory around them is neither read nor written."""
    check_small(trial, *_shapes(example), strided=True)


@small_check(
    "inputs",
    catches="a kernel that uses an input as scratch memory, or rounds its rows up to whole tiles",
    fails="memory",
)
def inputs(trial: Trial, example: SmallProblem) -> None:
    """Inputs, and memory before and behind every operand, are neither read nor written by the call."""
    check_small(trial, *_shapes(example))
