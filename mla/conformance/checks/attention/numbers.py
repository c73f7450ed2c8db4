"""Precision of attention: large logits, and the log-sum-exp, whose errors are those of a merged output."""

from __future__ import annotations

from dataclasses import replace

from mla.conformance.checks.attention.common import (
    MIXED,
    SEGMENTS,
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
    require_lse,
)
from mla.conformance.checks.attention.grid import of_several
from mla.conformance.problems.attention import AttentionProblem, data
from mla.conformance.problems.attention_call import fitted, judge_out, serve, writes_lse
from mla.conformance.trial import Refused, Trial, expect

KIND = "numbers"
OVERFLOW = "logits that overflow: exp() without the maximum, or a narrow accumulator"
BASE = "a log-sum-exp to base 2, transposed, or without the scale"
SKIPS = "a path without the log-sum-exp that skips more than that"


@latent_check("lse", BASE, KIND)
def lse(trial: Trial) -> None:
    """The log-sum-exp is the natural logarithm, in fp32, laid out token by token."""
    require_lse(trial)
    check_lse(trial, latent(*MIXED), decode(33, 7, 100, heads=3), latent((4, 4), (9, 66), heads=4))
    check_lse(trial, decode(2500, 1, 70, heads=8), latent(*of_several(300, 5), heads=2))
    check_lse(trial, *(latent((2, 1, 3, 5), (2, 66, 3, 7), heads=count) for count in (20, 127)))
    check_lse(trial, latent((129, 1), (196, 5), heads=2, aimed=True))


@expanded_check("lse", BASE, KIND)
def expanded_lse(trial: Trial) -> None:
    """The log-sum-exp is the natural logarithm, in fp32, laid out token by token."""
    require_lse(trial)
    check_lse(trial, expanded(*SEGMENTS), expanded((4, 4), (9, 30), heads=4, causal=False))
    check_lse(trial, expanded((1, 2, 3), (2500, 9, 70), heads=4), expanded(*of_several(300, 5), heads=2))
    check_lse(trial, *(expanded((2, 1, 3, 5), (2, 66, 3, 7), heads=count) for count in (20, 127)))


def check_lse(trial: Trial, *problems: AttentionProblem) -> None:
    """Compare the op's `lse` with the truth, one case per problem."""
    for asked in problems:
        problem = fitted(trial, asked)
        with trial.case(problem.label):
            op, call = serve(trial, problem)
            trial.judge_lse(call.run(op)[1], data(problem, trial.dtype).lse, call.places())


@latent_check("large", OVERFLOW, KIND)
def large(trial: Trial) -> None:
    """Logits in the thousands, of either sign, still give a finite output that is close to the truth."""
    problems = (decode(33, 130, 5, 1, 2), latent((5, 9), (5, 70)), decode(1, 1, 1, heads=3))
    for problem in problems:
        check_large(trial, problem)


@expanded_check("large", OVERFLOW, KIND)
def expanded_large(trial: Trial) -> None:
    """Logits in the thousands, of either sign, still give a finite output that is close to the truth."""
    for problem in (expanded(*SEGMENTS), expanded((1, 1, 1), (1, 1, 2), heads=3)):
        check_large(trial, problem)


def check_large(trial: Trial, ordinary: AttentionProblem) -> None:
    """Compare outputs of huge logits, whose rounding errors are large themselves; so are the bounds."""
    problem = fitted(trial, replace(ordinary, magnitude=1e3))
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        out, sums = call.run(op)
        truth = data(problem, trial.dtype)
        expect(bool(out.isfinite().all()), "the output holds NaN or infinity")
        judge_out(trial, problem, out, call.places())
        if writes_lse(trial):
            gap = ((sums.double() - truth.lse) / truth.lse.abs().clamp_min(1)).abs().max().item()
            expect(gap <= 1e-3, f"lse has relative error {gap:.1e}, allowed 1e-3")


@latent_check("without_lse", SKIPS, "contract")
def without_lse(trial: Trial) -> None:
    """An op that declares lse_optional gives the same output when it gets no lse to write."""
    for lengths in (((5, 1, 9, 2), (5, 70, 64, 129)), ((1, 1, 1), (33, 0, 100))):
        check_without(trial, latent(*lengths))


@expanded_check("without_lse", SKIPS, "contract")
def expanded_without_lse(trial: Trial) -> None:
    """An op that declares lse_optional gives the same output when it gets no lse to write."""
    for lengths in (((5, 1, 20), (5, 33, 70)), ((3, 3), (3, 3))):
        check_without(trial, expanded(*lengths))


def check_without(trial: Trial, problem: AttentionProblem) -> None:
    """Run the op with `lse=None` and compare its `out` with the truth."""
    problem = fitted(trial, problem)
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        if not op.lse_optional:
            raise Refused("it always writes the log-sum-exp (lse_optional is False)")
        out, _ = call.outputs()
        call.attend(op, call.prepare(op), out, None)
        judge_out(trial, problem, out, call.places())
