"""Attention whose log-sum-exp nobody reads: what the layer asks of an op that declares `lse_optional`."""

from __future__ import annotations

from mla.conformance.problems.attention import AttentionProblem
from mla.conformance.problems.attention_call import judge_out, serve
from mla.conformance.registry import OP, check
from mla.conformance.trial import Refused, Trial

CATCHES = "a path without the log-sum-exp that skips more than that"


def judge_without(trial: Trial, problem: AttentionProblem) -> None:
    """Run the op with `lse=None` and compare its `out` with the truth."""
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        if not op.lse_optional:
            raise Refused("it always writes the log-sum-exp (lse_optional is False)")
        out, _ = call.outputs()
        op(call.prepare(op), **call.inputs, softmax_scale=problem.scale, out=out, lse=None)
        judge_out(trial, problem, out, call.places())


@check("latent.without_lse", scope=OP, kind="latent_attention", catches=CATCHES)
def latent(trial: Trial) -> None:
    """An op that declares lse_optional gives the same output when it gets no lse to write."""
    for lengths in (((5, 1, 9, 2), (5, 70, 64, 129)), ((1, 1, 1), (33, 0, 100))):
        judge_without(trial, AttentionProblem(True, *lengths))


@check("expanded.without_lse", scope=OP, kind="expanded_attention", catches=CATCHES)
def expanded(trial: Trial) -> None:
    """An op that declares lse_optional gives the same output when it gets no lse to write."""
    for lengths in (((5, 1, 20), (5, 33, 70)), ((3, 3), (3, 3))):
        judge_without(trial, AttentionProblem(False, *lengths))
