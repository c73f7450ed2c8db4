"""What lies around the operands of attention, and how they lie in memory.

Every check watches the memory before the first and behind the last row of outputs (`mla/cases/memory.py`).
"""

from __future__ import annotations

import torch

from mla.cases.memory import Layout
from mla.conformance.checks.attention.common import (
    MIXED,
    SEGMENTS,
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
)
from mla.conformance.checks.attention.tiles import BOUNDARIES
from mla.conformance.problems.attention import AttentionProblem
from mla.conformance.problems.attention_call import check_out, fitted, judge_both, serve
from mla.conformance.trial import Trial, expect
from mla.verify.tolerances import same_bits

KIND = "memory"


@latent_check("poison", "memory that is read and then multiplied by zero, which NaN survives", KIND)
def poison(trial: Trial) -> None:
    """Pages that no request owns hold NaN, including those that unused columns of a table name."""
    check_out(trial, decode(*BOUNDARIES), latent(*MIXED), layout=Layout(unowned=torch.nan))


@latent_check("tail", "slots past a request's end that leak into its softmax", KIND)
def tail(trial: Trial) -> None:
    """Slots past a request's end hold 1e4, or NaN where the op declares nan_safe_tail."""
    safe = trial.op is not None and trial.op.nan_safe_tail
    layout = Layout(unowned=torch.nan, tail=torch.nan if safe else 1e4)
    check_out(trial, decode(*BOUNDARIES), latent(*MIXED), layout=layout)


@latent_check("strided", "a kernel that ignores strides, or writes outside its output", KIND)
def strided(trial: Trial) -> None:
    """Queries, block table and outputs may be slices of wider tensors; memory around them is left alone."""
    check_strided(trial, latent(*MIXED), decode(33, 70, 130))


@latent_check("inputs", "a kernel that scales or rotates its input in place", KIND)
def inputs(trial: Trial) -> None:
    """Queries, cache and tables are unchanged after the call."""
    check_inputs(trial, latent(*MIXED), decode(33, 7, 64))


@expanded_check("strided", "a kernel that ignores strides, or writes outside its output", KIND)
def expanded_strided(trial: Trial) -> None:
    """All tensors may be slices of wider ones; memory around them is neither read nor written."""
    check_strided(trial, expanded(*SEGMENTS), expanded((7, 30), (7, 30), causal=False))


@expanded_check("inputs", "a kernel that scales its input in place", KIND)
def expanded_inputs(trial: Trial) -> None:
    """Queries, keys and values are unchanged after the call."""
    check_inputs(trial, expanded(*SEGMENTS), expanded((1, 1), (33, 7)))


def check_strided(trial: Trial, *problems: AttentionProblem) -> None:
    """Compare both outputs of calls whose operands are slices with the truth."""
    layout = Layout(strided=True)
    for asked in problems:
        problem = fitted(trial, asked)
        with trial.case(problem.label + layout.label):
            op, call = serve(trial, problem, layout)
            found = call.run(op)
            call.check_around(*call.inputs)
            judge_both(trial, call, found)


def check_inputs(trial: Trial, *problems: AttentionProblem) -> None:
    """Check that the op leaves every input unchanged."""
    for asked in problems:
        problem = fitted(trial, asked)
        with trial.case(problem.label):
            op, call = serve(trial, problem, Layout(unowned=3.0))
            before = {name: tensor.cpu().clone() for name, tensor in call.inputs.items()}
            call.run(op)
            call.check_around(*call.inputs)
            changed = [name for name, tensor in call.inputs.items() if not same_bits(tensor, before[name])]
            expect(not changed, f"the op wrote to its input {', '.join(changed)}")
