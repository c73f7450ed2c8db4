"""`latent_attention`: all heads over the paged latents, causal and ragged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla.conformance.problems.attention import SMALL, AttentionProblem, Lengths, data
from mla.conformance.problems.attention_call import (
    Layout,
    check_inputs,
    check_lse,
    check_out,
    check_prepare,
    check_reuse,
    serve,
)
from mla.conformance.registry import OP, check
from mla.conformance.trial import Refused, Trial, expect
from mla.verify.tolerances import relative_error

BOUNDARIES: Lengths = (1, 63, 64, 65, 127, 128, 129)
# A request of each kind: prefill, decode, several tokens with history, one across a page's end.
MIXED = ((5, 1, 9, 2), (5, 70, 64, 129))


def latent_check(
    name: str, catches: str, fails: str = "formula"
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a check that runs once per op and dtype."""
    return check(f"latent.{name}", catches=catches, scope=OP, kind="latent_attention", fails=fails)


def writes_lse(trial: Trial) -> bool:
    """Return whether the op supplies the log-sum-exp; the layer needs it only to merge parts of a context."""
    return bool(getattr(trial.op, "writes_lse", True))


def require_lse(trial: Trial) -> None:
    """Refuse to judge a log-sum-exp that the op does not supply."""
    if not writes_lse(trial):
        raise Refused("it does not supply the log-sum-exp (writes_lse is False)")


def latent(query_lens: Lengths, kv_lens: Lengths, **changes: Any) -> AttentionProblem:
    """Return an absorbed problem."""
    return AttentionProblem(True, query_lens, kv_lens, **changes)


def decode(*kv_lens: int, **changes: Any) -> AttentionProblem:
    """Return a problem of one new token per request."""
    return latent((1,) * len(kv_lens), kv_lens, **changes)


Register = Callable[[str, str], Callable[[Callable[[Trial], None]], Callable[[Trial], None]]]


def state_checks(
    register: Register, problem: AttentionProblem, other: AttentionProblem, slow_plan: str
) -> None:
    """Register what holds for the prepared state of every attention op; `slow_plan` is a bug of its plan."""

    @register("reuse", "a plan that is used up by one layer, or scratch memory that two batches share")
    def reuse(trial: Trial) -> None:
        """One prepared state serves several layers, with another batch's calls in between."""
        check_reuse(trial, problem, other)

    @register("prepare", slow_plan)
    def prepare(trial: Trial) -> None:
        """Preparing a batch does not wait for pending work on the device."""
        check_prepare(trial, problem)


@latent_check("decode", "a block table row, a length or a head taken from a neighbour")
def decode_step(trial: Trial) -> None:
    """One new token per request attends histories of different lengths."""
    check_out(trial, decode(33, 7, 100, 64, 3), decode(90))


@latent_check("page_boundaries", "a last page that is dropped, or read past the request's end")
def page_boundaries(trial: Trial) -> None:
    """Lengths just below, at and just above a page's end are attended in full."""
    check_out(trial, decode(*BOUNDARIES), *(decode(length) for length in BOUNDARIES[1:6]))


@latent_check("page_sizes", "an op that assumes pages of 64 tokens without saying so")
def page_sizes(trial: Trial) -> None:
    """Pages of any size are served, or refused with a reason."""
    for size in (1, 16, 128) if trial.quick else (1, 2, 4, 8, 16, 32, 128, 256):
        check_out(trial, decode(33, 7, 130, page_size=size), latent(*MIXED, page_size=size))


@latent_check("poison", "memory that is read and then multiplied by zero, which NaN survives")
def poison(trial: Trial) -> None:
    """Pages that no request owns hold NaN, including those that unused columns of a table name."""
    check_out(trial, decode(*BOUNDARIES), latent(*MIXED), layout=Layout(unowned=torch.nan))


@latent_check("tail", "slots past a request's end that leak into its softmax")
def tail(trial: Trial) -> None:
    """Slots past a request's end hold 1e4, or NaN where the op declares nan_safe_tail."""
    safe = trial.op is not None and trial.op.nan_safe_tail
    layout = Layout(unowned=torch.nan, tail=torch.nan if safe else 1e4)
    check_out(trial, decode(*BOUNDARIES), latent(*MIXED), layout=layout)


@latent_check("multi_token", "a mask that is off by one when several tokens follow a history")
def multi_token(trial: Trial) -> None:
    """Several new tokens per request, as in speculative decoding, are causal after their history."""
    for count in (2, 3) if trial.quick else (2, 3, 4, 5, 8):
        check_out(trial, latent((count,) * 3, (70, count + 1, 64)))


@latent_check("prefill", "a mask that leaks future tokens, which a long history hides")
def prefill(trial: Trial) -> None:
    """Requests without history see their own tokens up to each query."""
    lengths = (5, 1, 20) if trial.quick else (5, 1, 20, 64, 65, 150)
    check_out(trial, latent(lengths, lengths))


@latent_check("mixed", "tokens of one request that land in the rows of another")
def mixed(trial: Trial) -> None:
    """Prefill, decode and several tokens after a history share a batch."""
    check_out(trial, latent(*MIXED), latent((1, 12, 1), (65, 40, 9)))


@latent_check("zero_queries", "a request without new tokens that shifts those after it")
def zero_queries(trial: Trial) -> None:
    """Requests without new tokens take no row, wherever they are in the batch."""
    check_out(trial, latent((0, 2, 0, 1, 0), (5, 66, 0, 30, 64)))


@latent_check("empty_rows", "NaN in the rows a captured graph pads its batch with")
def empty_rows(trial: Trial) -> None:
    """A token without keys gets 0 and a log-sum-exp of -inf, among others and alone."""
    for problem in (decode(0, 40, 0, 65), decode(0, 0)):
        with trial.case(problem.label):
            op, call = serve(trial, problem, Layout(unowned=torch.nan))
            out, lse = call.run(op)
            empty = [i for i, length in enumerate(problem.kv_lens) if length == 0]
            expect(bool((out[empty] == 0).all()), "`out` of a token without keys is not 0")
            if writes_lse(trial):
                trial.judge_lse(lse, data(problem, trial.dtype).lse, call.places())
            rows = [i for i, length in enumerate(problem.kv_lens) if length]
            expect(bool(out[rows].isfinite().all()), "`out` next to a token without keys holds NaN")


@latent_check("heads", "a head count that is padded, cut or grouped without saying so")
def heads(trial: Trial) -> None:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    counts = (1, 3, 128) if trial.quick else (1, 2, 3, 4, 5, 8, 12, 20, 24, 32, 40, 48, 64, 96, 128)
    check_out(trial, *(latent((1, 3), (65, 20), heads=count) for count in counts))


@latent_check("lse", "a log-sum-exp to base 2, transposed, or without the scale")
def lse(trial: Trial) -> None:
    """The log-sum-exp is the natural logarithm, in fp32, laid out token by token."""
    require_lse(trial)
    check_lse(trial, latent(*MIXED), decode(33, 7, 100, heads=3), latent((4, 4), (9, 66), heads=4))


@latent_check("scale", "a scale that is derived from the widths instead of taken from the call")
def scale(trial: Trial) -> None:
    """The softmax scale is the one that is passed."""
    check_out(trial, *(latent(*MIXED, scale_factor=factor) for factor in (0.4, 1.9)))


@latent_check("large", "logits that overflow: exp() without the maximum, or a narrow accumulator")
def large(trial: Trial) -> None:
    """Logits in the thousands still give a finite output that is close to the truth."""
    for problem in (decode(33, 130, 5, magnitude=1e3), latent((5, 9), (5, 70), magnitude=1e3)):
        with trial.case(problem.label):
            op, call = serve(trial, problem)
            out, sums = call.run(op)
            check_large(out, sums if writes_lse(trial) else None, problem, trial)


def check_large(
    out: torch.Tensor, sums: torch.Tensor | None, problem: AttentionProblem, trial: Trial
) -> None:
    """Compare outputs of huge logits with wide bounds: fp32 logits themselves have rounding errors."""
    truth = data(problem, trial.dtype)
    expect(bool(out.isfinite().all()), "the output holds NaN or infinity")
    error = relative_error((out, truth.out))
    expect(error <= 2e-2, f"relative error {error:.1e}, allowed 2e-2")
    if sums is None:
        return
    gap = ((sums.double() - truth.lse) / truth.lse.abs().clamp_min(1)).abs().max().item()
    expect(gap <= 1e-3, f"lse has relative error {gap:.1e}, allowed 1e-3")


@latent_check("long", "partial results of a split context that are merged wrongly")
def long(trial: Trial) -> None:
    """A context of thousands of tokens next to short ones is attended in full."""
    lengths = (2500, 1, 70) if trial.quick else (8193, 1, 4096, 70)
    check_out(trial, decode(*lengths, heads=8))


@latent_check("strided", "a kernel that ignores strides, or writes outside its output")
def strided(trial: Trial) -> None:
    """Queries and output may be slices of wider tensors; memory around them is neither read nor written."""
    check_out(trial, latent(*MIXED), layout=Layout(strided=True))


state_checks(
    latent_check,
    latent(*MIXED),
    latent((1, 12, 1), (65, 40, 9)),
    "a plan step that copies lengths back from the device, once per step",
)


@latent_check("inputs", "a kernel that scales or rotates its input in place")
def inputs(trial: Trial) -> None:
    """Queries, cache and tables are unchanged after the call."""
    check_inputs(trial, latent(*MIXED))


@latent_check("other_widths", "a kernel compiled for 512 + 64 that runs on other widths anyway")
def other_widths(trial: Trial) -> None:
    """Widths other than 512 + 64 are served, or refused with a reason."""
    check_out(trial, latent(*MIXED, dims=SMALL, heads=3, page_size=16))


@latent_check("stepping", "lengths that are remembered from the first time a batch was prepared")
def stepping(trial: Trial) -> None:
    """The same requests, one token longer each step, are attended in full every step."""
    check_out(trial, *(decode(length, length - 30) for length in range(62, 67)))
