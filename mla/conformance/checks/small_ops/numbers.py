"""Small ops: long sums, and rows and columns of different sizes."""

from __future__ import annotations

import itertools

import torch

from mla.conformance.checks.small_ops.kinds import PRODUCTS, small_check, vary
from mla.conformance.problems.small_call import check_small
from mla.conformance.problems.small_ops import Norm, SmallProblem
from mla.conformance.trial import Trial

# Powers of two between rows; float16 has few.
SPREAD = {torch.bfloat16: 12, torch.float16: 6, torch.float32: 12}


@small_check(
    "long_sums",
    catches="sums, or partial sums of a split, that are kept or rounded in a narrow dtype",
    fails="numbers",
    kinds=PRODUCTS,
)
def long_sums(trial: Trial, example: SmallProblem) -> None:
    """Products over thousands of inputs are as accurate as short ones, even where parts of a sum cancel."""
    few = {"outputs": 64} if trial.quick and example.kind == "batched_linear" else {}
    # Not in float32, whose own sums err by what cancels.
    for cancels in (False,) if trial.dtype == torch.float32 else (False, True):
        for inputs, tokens in itertools.product((7168,) if trial.quick else (2048, 7168, 16384), (3, 66)):
            more = {"tokens": tokens, "inputs": inputs, "cancels": cancels}
            check_small(trial, vary(example, **few, **more))


@small_check(
    "long_sums",
    catches="squares that are summed in a narrow dtype",
    fails="numbers",
    kinds=("rms_norm",),
)
def long_norms(trial: Trial, example: SmallProblem) -> None:
    """Rows of thousands of features are normalized as accurately as short ones."""
    check_small(trial, *(Norm(tokens=3, features=width) for width in (7168, 16384)))


@small_check("sizes", catches="a scale that rows share, as of numbers in 8 bits", fails="numbers")
def sizes(trial: Trial, example: SmallProblem) -> None:
    """Rows that are thousands of times as large as others of the same call are all right."""
    check_small(trial, *(vary(example, tokens=tokens, spread=SPREAD[trial.dtype]) for tokens in (7, 66)))


@small_check(
    "outlier", catches="a scale that an outlier sets for a whole row", fails="numbers", kinds=PRODUCTS
)
def outlier(trial: Trial, example: SmallProblem) -> None:
    """An input that is far larger than others, and counts as much, costs no accuracy."""
    check_small(trial, *(vary(example, tokens=tokens, outlier=True) for tokens in (1, 66)))
