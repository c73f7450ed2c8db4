"""`expanded_attention`: ordinary multi-head attention over ragged segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla.conformance.checks.latent_attention import check_large, require_lse, state_checks, writes_lse
from mla.conformance.problems.attention import SMALL, AttentionProblem, Lengths
from mla.conformance.problems.attention_call import (
    Layout,
    check_inputs,
    check_lse,
    check_out,
    serve,
)
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial, expect

# A segment without history, some with one, and a single query.
MIXED = ((5, 1, 20, 3), (5, 70, 20, 67))


def expanded_check(
    name: str, catches: str, fails: str = "formula"
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a check that runs once per op and dtype."""
    return check(f"expanded.{name}", catches=catches, scope=OP, kind="expanded_attention", fails=fails)


def expanded(query_lens: Lengths, kv_lens: Lengths, **changes: Any) -> AttentionProblem:
    """Return an expanded problem."""
    return AttentionProblem(False, query_lens, kv_lens, **changes)


@expanded_check("prefill", "a mask that leaks future tokens")
def prefill(trial: Trial) -> None:
    """Segments without history see their own tokens up to each query."""
    lengths = (5, 1, 40) if trial.quick else (5, 1, 40, 64, 65, 129, 300)
    check_out(trial, expanded(lengths, lengths))


@expanded_check("history", "causality aligned at the first key instead of the last")
def history(trial: Trial) -> None:
    """The last query of a segment sees the last key, whatever the history before it."""
    check_out(trial, expanded((3, 9), (40, 64)), expanded((1, 2, 5), (65, 129, 6)))


@expanded_check("mixed", "rows of one segment that attend another")
def mixed(trial: Trial) -> None:
    """Segments of all kinds lie back to back in one call."""
    check_out(trial, expanded(*MIXED))


@expanded_check("unmasked", "a mask that is applied although the call is not causal")
def unmasked(trial: Trial) -> None:
    """Without a mask every query sees every key of its segment, even when there are fewer keys."""
    check_out(trial, expanded((5, 1, 20), (3, 9, 20), causal=False))


@expanded_check("empty_segments", "a segment without queries or keys that shifts its neighbours or gives NaN")
def empty_segments(trial: Trial) -> None:
    """Segments may lack queries, or keys: then `out` is 0 and the log-sum-exp -inf."""
    check_out(trial, expanded((0, 4, 0, 3), (6, 9, 0, 3)))
    problem = expanded((2, 3), (0, 5), causal=False)
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        out, sums = call.run(op)
        expect(bool((out[:2] == 0).all()), "`out` of a query without keys is not 0")
        written = bool((sums[:2] == -torch.inf).all())
        expect(written or not writes_lse(trial), "`lse` of a query without keys is not -inf")
        expect(bool(out[2:].isfinite().all()), "`out` next to a query without keys holds NaN")


@expanded_check("heads", "a head count that is padded, cut or grouped without saying so")
def heads(trial: Trial) -> None:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    counts = (1, 3, 128) if trial.quick else (1, 2, 3, 5, 8, 12, 20, 32, 40, 64, 96, 128)
    check_out(trial, *(expanded((4, 2), (4, 30), heads=count) for count in counts))


@expanded_check("lse", "a log-sum-exp to base 2, transposed, or without the scale")
def lse(trial: Trial) -> None:
    """The log-sum-exp is the natural logarithm, in fp32, laid out token by token."""
    require_lse(trial)
    check_lse(trial, expanded(*MIXED), expanded((4, 4), (9, 30), heads=4, causal=False))


@expanded_check("scale", "a scale that is derived from the widths instead of taken from the call")
def scale(trial: Trial) -> None:
    """The softmax scale is the one that is passed."""
    check_out(trial, *(expanded(*MIXED, scale_factor=factor) for factor in (0.4, 1.9)))


@expanded_check("large", "logits that overflow: exp() without the maximum, or a narrow accumulator")
def large(trial: Trial) -> None:
    """Logits in the thousands still give a finite output that is close to the truth."""
    problem = expanded(*MIXED, magnitude=1e3)
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        out, sums = call.run(op)
        check_large(out, sums if writes_lse(trial) else None, problem, trial)


@expanded_check("strided", "a kernel that ignores strides, or writes outside its output")
def strided(trial: Trial) -> None:
    """All tensors may be slices of wider ones; memory around them is neither read nor written."""
    check_out(trial, expanded(*MIXED), layout=Layout(strided=True))


@expanded_check("inputs", "a kernel that scales its input in place")
def inputs(trial: Trial) -> None:
    """Queries, keys and values are unchanged after the call."""
    check_inputs(trial, expanded(*MIXED))


STATE_PROBLEMS = (expanded(*MIXED), expanded((1, 12, 1), (65, 40, 9)))
state_checks(expanded_check, *STATE_PROBLEMS, "a plan step that waits for the device")


@expanded_check("other_widths", "a kernel compiled for 192 and 128 that runs on other widths anyway")
def other_widths(trial: Trial) -> None:
    """Widths other than 192 and 128 are served, or refused with a reason."""
    check_out(trial, expanded(*MIXED, dims=SMALL, heads=3))
