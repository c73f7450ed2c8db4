"""`rms_norm` and `rotate_query`: fp32 inside, rounded once."""

from __future__ import annotations

import itertools

from mla.conformance.problems.small_call import check_small, expect_unchanged, small_call
from mla.conformance.problems.small_ops import Norm, Rotation
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial

NORM, ROTATE = "rms_norm", "rotate_query"


@check("rms_norm.formula", scope=OP, kind=NORM, catches="a norm over the wrong width, or without its weight")
def norm_formula(trial: Trial) -> None:
    """x / sqrt(mean(x^2) + eps) * weight, over rows of any width."""
    widths = (1536, 33) if trial.quick else (1536, 768, 33, 1)
    check_small(trial, *(Norm(tokens=t, features=width) for width, t in itertools.product(widths, (1, 70))))


@check("rms_norm.eps", scope=OP, kind=NORM, catches="an eps that is fixed, or added after the square root")
def norm_eps(trial: Trial) -> None:
    """With small inputs eps matters, and it is the one that is passed."""
    check_small(trial, *(Norm(features=1536, size=1e-3, eps=eps) for eps in (1e-6, 1e-5)))


@check("rms_norm.large", scope=OP, kind=NORM, catches="squares that overflow a narrow dtype", fails="numbers")
def norm_large(trial: Trial) -> None:
    """Inputs in the hundreds are normalized as accurately as small ones."""
    check_small(trial, Norm(features=1536, size=500.0))


@check("rotate_query.interleaved", scope=OP, kind=ROTATE, catches="halves rotated where channels alternate")
def rotate_interleaved(trial: Trial) -> None:
    """Interleaved: channels 2i and 2i + 1 are rotated together, and stay where they are."""
    check_small(trial, *(Rotation(heads=heads) for heads in ((16, 3) if trial.quick else (16, 1, 3, 128))))


@check("rotate_query.halves", scope=OP, kind=ROTATE, catches="the `interleaved` argument ignored")
def rotate_halves(trial: Trial) -> None:
    """Not interleaved: channels i and i + r/2 are rotated together."""
    check_small(trial, Rotation(interleaved=False))


@check(
    "rotate_query.in_place",
    scope=OP,
    kind=ROTATE,
    catches="a second channel computed from the rotated first",
    fails="memory",
)
def rotate_in_place(trial: Trial) -> None:
    """`out` may be x itself, as a slice of a wider tensor."""
    for interleaved in (True, False):
        problem = Rotation(interleaved=interleaved)
        with trial.case(problem.label):
            call = small_call(trial, problem, strided=True)
            out = call.run(call.inputs["x"])
            call.judge(out)
            call.expect_guards(out)
            expect_unchanged(call.inputs["cos_sin"], "cos_sin")
