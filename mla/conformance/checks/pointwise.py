"""`rms_norm` and `rotate_query`: fp32 inside, rounded once."""

from __future__ import annotations

import itertools

import torch

from mla.conformance.problems.attention import DEEPSEEK, attention_spec
from mla.conformance.problems.tensors import angles, blank, draw, expect_margin, place
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial, expect
from mla.reference import REFERENCE
from mla.verify.op_oracle import true_norm, true_rotation
from mla.verify.tolerances import same_bits
from mla_backends.api import FusedOp, NormSpec

NORM, ROTATE = "rms_norm", "rotate_query"


# ---------------------------------------------------------------------------------------------- rms_norm


def check_norm(
    trial: Trial,
    features: int = 1536,
    *,
    size: float = 1.0,
    eps: float = 1e-6,
    tokens: int = 6,
    strided: bool = False,
) -> None:
    """Compare one norm with the truth; `size` scales its input."""
    with trial.case(f"{tokens} tokens, {features} features, size {size:g}, eps {eps:g}"):
        op = trial.require(NormSpec(features, trial.dtype, trial.device))
        x = (draw(tokens, features) * size).to(trial.dtype)
        weight = draw(features, dtype=trial.dtype, seed=1)
        expected = torch.empty_like(x)
        REFERENCE[NORM](x=x, weight=weight, eps=eps, out=expected)
        out = blank(tuple(x.shape), trial.dtype, trial.device, strided)
        on_device, on_device_weight = place(x, trial.device, strided), weight.to(trial.device, copy=True)
        op(x=on_device, weight=on_device_weight, eps=eps, out=out)
        trial.judge(out, true_norm(x, weight, eps), expected, "out")
        if strided:
            expect_margin(out)
        unchanged = same_bits(on_device, x) and same_bits(on_device_weight, weight)
        expect(unchanged, "the op wrote to its input")


@check("rms_norm.formula", scope=OP, kind=NORM, catches="a norm over the wrong width, or without its weight")
def norm_formula(trial: Trial) -> None:
    """x / sqrt(mean(x^2) + eps) * weight, over rows of any width."""
    for features, tokens in itertools.product((1536, 33) if trial.quick else (1536, 768, 33, 1), (1, 70)):
        check_norm(trial, features, tokens=tokens)


@check("rms_norm.eps", scope=OP, kind=NORM, catches="an eps that is fixed, or added after the square root")
def norm_eps(trial: Trial) -> None:
    """With small inputs eps matters, and it is the one that is passed."""
    for eps in (1e-6, 1e-5):
        check_norm(trial, size=1e-3, eps=eps)


@check("rms_norm.large", scope=OP, kind=NORM, catches="squares that overflow a narrow dtype")
def norm_large(trial: Trial) -> None:
    """Inputs in the hundreds are normalized as accurately as small ones."""
    check_norm(trial, size=500.0)


@check(
    "rms_norm.strided",
    scope=OP,
    kind=NORM,
    catches="a kernel that ignores strides, or writes outside its output",
)
def norm_strided(trial: Trial) -> None:
    """Input and output may be columns of wider tensors; memory around them is neither read nor written."""
    check_norm(trial, strided=True)


# ------------------------------------------------------------------------------------------ rotate_query


def rotation_op(trial: Trial, heads: int) -> FusedOp:
    """Return the op if it serves this number of heads; raises `Refused`."""
    return trial.require(attention_spec(heads, DEEPSEEK, DEEPSEEK.scale, trial.dtype, trial.device))


def check_rotation(
    trial: Trial, interleaved: bool, heads: int = 16, tokens: int = 7, strided: bool = False
) -> None:
    """Compare one rotation with the truth."""
    with trial.case(f"{tokens} tokens, {heads} heads, {'interleaved' if interleaved else 'halves'}"):
        op = rotation_op(trial, heads)
        x, cos_sin = draw(tokens, heads, 64, dtype=trial.dtype), angles(tokens, 64)
        expected = torch.empty_like(x)
        REFERENCE[ROTATE](x=x, cos_sin=cos_sin, interleaved=interleaved, out=expected)
        on_device, out = (
            place(x, trial.device, strided),
            blank(tuple(x.shape), trial.dtype, trial.device, strided),
        )
        op(x=on_device, cos_sin=cos_sin.to(trial.device), interleaved=interleaved, out=out)
        trial.judge(out, true_rotation(x, cos_sin, interleaved), expected, "out")
        if strided:
            expect_margin(out)
        expect(same_bits(on_device, x), "the op wrote to x, which is not its output")


@check("rotate_query.interleaved", scope=OP, kind=ROTATE, catches="halves rotated where channels alternate")
def rotate_interleaved(trial: Trial) -> None:
    """Interleaved: channels 2i and 2i + 1 are rotated together, and stay where they are."""
    for heads in (16, 3) if trial.quick else (16, 1, 3, 128):
        check_rotation(trial, True, heads)


@check("rotate_query.halves", scope=OP, kind=ROTATE, catches="the `interleaved` argument ignored")
def rotate_halves(trial: Trial) -> None:
    """Not interleaved: channels i and i + r/2 are rotated together."""
    check_rotation(trial, False)


@check(
    "rotate_query.heads", scope=OP, kind=ROTATE, catches="angles of another token when there are many rows"
)
def rotate_heads(trial: Trial) -> None:
    """Every head of a token is rotated by that token's angles."""
    for heads, tokens in ((128, 3), (1, 130)):
        check_rotation(trial, True, heads, tokens)


@check("rotate_query.strided", scope=OP, kind=ROTATE, catches="a kernel that ignores strides")
def rotate_strided(trial: Trial) -> None:
    """Input and output may be columns of wider tensors; memory around them is neither read nor written."""
    check_rotation(trial, True, strided=True)


@check(
    "rotate_query.in_place", scope=OP, kind=ROTATE, catches="a second channel computed from the rotated first"
)
def rotate_in_place(trial: Trial) -> None:
    """`out` may be x itself, as columns of a wider tensor."""
    for interleaved in (True, False):
        with trial.case("interleaved" if interleaved else "halves"):
            op = rotation_op(trial, 16)
            x, cos_sin = draw(7, 16, 64, dtype=trial.dtype), angles(7, 64)
            expected = torch.empty_like(x)
            REFERENCE[ROTATE](x=x, cos_sin=cos_sin, interleaved=interleaved, out=expected)
            part = place(x, trial.device, strided=True)
            op(x=part, cos_sin=cos_sin.to(trial.device), interleaved=interleaved, out=part)
            trial.judge(part, true_rotation(x, cos_sin, interleaved), expected, "out")
            expect_margin(part)
