"""Attention of nothing: requests without new tokens or without keys, and batches of no others."""

from __future__ import annotations

import torch

from mla.cases.memory import PLAIN, Layout
from mla.conformance.checks.attention.common import (
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
)
from mla.conformance.problems.attention import AttentionProblem, data
from mla.conformance.problems.attention_call import check_out, fitted, judge_both, serve, writes_lse
from mla.conformance.trial import Trial, expect

KIND = "emptiness"


@latent_check("zero_queries", "a request without new tokens that shifts those after it", KIND)
def zero_queries(trial: Trial) -> None:
    """Requests without new tokens take no row, wherever they are in the batch."""
    for lengths in (
        ((0, 2, 0, 1, 0), (5, 66, 0, 30, 64)),
        ((0, 0, 3), (70, 0, 9)),
        ((1, 0, 0), (9, 9, 0)),
        ((1, 0, 0, 0, 1), (65, 64, 3, 0, 20)),
    ):
        check_out(trial, latent(*lengths))


@latent_check("empty_rows", "NaN in the rows a captured graph pads its batch with", KIND)
def empty_rows(trial: Trial) -> None:
    """A token without keys gets 0 and a log-sum-exp of -inf, at every place of a batch and alone."""
    for lengths in ((0, 40, 0, 65), (0, 0), (70, 3, 0), (0, 9), (1, 0, 0, 0, 64, 0), (0,)):
        check_empty(trial, decode(*lengths), Layout(unowned=torch.nan))


@latent_check("no_tokens", "a grid of no blocks, which cannot be launched", KIND)
def no_tokens(trial: Trial) -> None:
    """A batch may have no new tokens at all."""
    check_nothing(trial, latent((0, 0), (5, 64)), latent((0,), (70,)), latent((0,), (0,)))


@expanded_check(
    "empty_segments", "a segment without queries or keys that shifts its neighbours or gives NaN", KIND
)
def empty_segments(trial: Trial) -> None:
    """Segments may lack queries, or keys: then `out` is 0 and the log-sum-exp -inf."""
    for lengths in (((0, 4, 0, 3), (6, 9, 0, 3)), ((3, 0), (70, 5)), ((0, 0, 2), (3, 70, 2))):
        check_out(trial, expanded(*lengths))
    for lengths in (((2, 3), (0, 5)), ((3, 2), (5, 0)), ((1, 3, 2), (9, 0, 66)), ((2, 1), (0, 0))):
        check_empty(trial, expanded(*lengths, causal=False))


@expanded_check("no_tokens", "a grid of no blocks, which cannot be launched", KIND)
def expanded_no_tokens(trial: Trial) -> None:
    """A call may have no queries at all."""
    check_nothing(trial, expanded((0, 0), (5, 64)), expanded((0,), (70,)), expanded((0,), (0,)))


def check_empty(trial: Trial, problem: AttentionProblem, layout: Layout = PLAIN) -> None:
    """Check what tokens without keys get, and that the others are right."""
    problem = fitted(trial, problem)
    with trial.case(problem.label):
        op, call = serve(trial, problem, layout)
        out, sums = call.run(op)
        truth = data(problem, trial.dtype)
        blind = (truth.lse == -torch.inf).all(-1)
        expect(bool((out[blind] == 0).all()), "`out` of a token without keys is not 0")
        written = bool((sums[blind] == -torch.inf).all())
        expect(written or not writes_lse(trial), "`lse` of a token without keys is not -inf")
        expect(bool(out[~blind].isfinite().all()), "`out` next to a token without keys holds NaN")
        judge_both(trial, call, (out, sums))


def check_nothing(trial: Trial, *problems: AttentionProblem) -> None:
    """Check that a call without rows returns, and writes nothing."""
    for asked in problems:
        problem = fitted(trial, asked)
        with trial.case(problem.label):
            op, call = serve(trial, problem)
            out, _ = call.run(op)
            expect(out.shape[0] == 0, "a batch without new tokens has rows")
