"""How far from the truth an output may be, and when it is right: row by row and as a whole.

Truth is float64. The reference, run in the op's dtype, shows which error the numbers at hand make
unavoidable, but as one sample of it: another order of sums errs elsewhere. benchmarks/README.md derives what
follows, and `benchmarks/rounding` shows what it leaves to right ops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla.verify.places import Places, describe, name_row, pattern_of


class Allowed(NamedTuple):
    """Relative errors in one dtype."""

    op: float  # of an op's result, as a root mean square, that any right op may have
    layer: float  # the same of a layer's output
    whole: float  # of a layer's whole output at most, whatever the reference's
    lse: float  # of a log-sum-exp at most


# The one table. u is the unit roundoff: 2^-8 in bfloat16, 2^-11 in float16, 2^-24 in float32.
#
# - bfloat16, float16: sums are fp32, so what counts is rounding rows to the dtype, 0.43 u each. An op rounds
#   its result. A layer rounds three rows one after another at least (what attention gives, what W_UV gives or
#   the values, what o_proj gives): 0.43 u sqrt(3).
# - float32: sums themselves are rounded. In the worst order, one accumulator for all of n terms, they err by
#   0.43 u sqrt(n / 2): 5e-6 for the 2^16 terms of a long context. One of a layer's sums may be that long.
#
# A log-sum-exp is fp32 whatever the dtype, and its error is a relative error of the merged output.
ALLOWED = {
    torch.bfloat16: Allowed(op=1.7e-3, layer=2.9e-3, whole=2e-2, lse=1e-3),
    torch.float16: Allowed(op=2.1e-4, layer=3.6e-4, whole=4e-3, lse=1e-3),
    torch.float32: Allowed(op=5e-6, layer=5e-6, whole=1e-5, lse=2e-5),
}
BOUNDS = {dtype: row.whole for dtype, row in ALLOWED.items()}  # of whole outputs of layers
UNITS = {dtype: row.op for dtype, row in ALLOWED.items()}

TWICE = 2.0  # an output may err by twice the typical error
ROW_SLACK = 1.5  # ... with this in a row of an op, beside what the reference errs there,
# ... or this in a row of a layer: a rounding of a query that falls the other way moves a logit, and one logit
# may decide a row, which then errs like one number and not like a mean.
LAYER_SLACK = 2.5
CAP_SLACK = 2.0  # one row of a layer may exceed the largest error of the whole by this
CANCELLATION = 6.0  # numbers of a row that may cancel
# The probability that a row of random numbers is smaller by chance than the rule allows for.
CHANCE = 1e-7
# A logit of size s has a rounding error of several 2^-24 s in fp32, and its weight that relative error.
LOGIT = 8 * 2.0**-24
LEAST_NORM = torch.finfo(torch.float64).tiny  # stands in for the norm of zeros


@dataclass(frozen=True)
class Bounds:
    """Largest relative errors of outputs that are right."""

    many: float  # of the whole of many rows
    rows: torch.Tensor  # of each row

    def of_whole(self, allowed: torch.Tensor, sizes: torch.Tensor) -> float:
        """Return the bound on the whole of some rows, from what each may err by and their norms.

        Beside `many`, any one of them may be as wrong as a row may.
        """
        worst = (allowed * sizes).max().item() if sizes.numel() else 0.0
        return math.hypot(self.many, worst / max(sizes.norm().item(), LEAST_NORM))


def op_bounds(
    known: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, lse: torch.Tensor | None = None
) -> Bounds:
    """Return the bounds on an op's result [.., w], given the reference's relative error in every row.

    `lse` is the true log-sum-exp of every row, if it has one: the size of the largest logit.
    """
    sizes = truth.norm(dim=-1).clamp_min(LEAST_NORM)
    floor = torch.tensor(ALLOWED[dtype].op, dtype=torch.float64)
    floor = floor.maximum(half_subnormal(dtype) * math.sqrt(truth.shape[-1]) / sizes)
    if lse is not None:
        floor = floor.maximum(LOGIT * lse.double().abs().nan_to_num(posinf=0.0))
    means = mean_over(known, sizes), mean_over(floor.expand(sizes.shape), sizes)
    typical = max(*means, ALLOWED[dtype].op)  # which is left where there are no rows
    return Bounds(TWICE * typical, _rows(known, sizes, truth.shape[-1], ROW_SLACK * floor.clamp_min(typical)))


def half_subnormal(dtype: torch.dtype) -> float:
    """Return by how much rounding to a dtype changes a number at most that is below its normal ones."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / 2


def layer_bounds(known: torch.Tensor | None, truth: torch.Tensor, dtype: torch.dtype) -> Bounds:
    """Return the bounds on a layer's output [.., d], given the reference's relative error in every row.

    None means that the output is held to the table alone.
    """
    allowed, sizes = ALLOWED[dtype], truth.norm(dim=-1)
    cap = CAP_SLACK * allowed.whole
    if known is None:
        return Bounds(allowed.whole, torch.full_like(sizes, cap))
    typical = max(mean_over(known, sizes), allowed.layer)
    slack = torch.tensor(LAYER_SLACK * typical, dtype=torch.float64)
    rows = _rows(known, sizes, truth.shape[-1], slack).clamp_max(cap)
    return Bounds(min(TWICE * typical, allowed.whole), rows)


def table_decides(dtype: torch.dtype) -> bool:
    """Return whether a layer needs no reference: any right one has what the table allows at most."""
    return TWICE * ALLOWED[dtype].layer >= ALLOWED[dtype].whole


def mean_over(errors: torch.Tensor, sizes: torch.Tensor) -> float:
    """Return the relative error of the whole, given those of its rows and their norms."""
    return ((errors * sizes).norm() / sizes.norm().clamp_min(LEAST_NORM)).item()


def _rows(known: torch.Tensor, sizes: torch.Tensor, width: int, slack: torch.Tensor) -> torch.Tensor:
    """Return what each row may err by, given what the reference does in it and `others` may add to that.

    Both are independent: squares add. A narrow row may be small because its numbers cancel, which takes no
    errors away. A wide one is small for other reasons, such as a mean over more keys, and its errors are
    small with it.
    """
    usual = (sizes.square().mean() / sizes.square().clamp_min(LEAST_NORM)).clamp_max(shrinkage(width))
    cancelled = torch.where(sizes > LEAST_NORM, 1 + CANCELLATION / width * usual, 1.0)
    return TWICE * torch.hypot(known, slack * cancelled.sqrt())


def shrinkage(width: int) -> float:
    """Return how many times smaller than usual, in squares, a row of random numbers hardly ever is.

    The sum of `width` squares of N(0, 1) is below x width with probability at most (x e)^(width / 2) /
    sqrt(pi width): the lower tail of the chi-square distribution, with Stirling's formula.
    """
    return float(math.e * (1 / (CHANCE * math.sqrt(math.pi * width))) ** (2 / width))


def judge(
    result: torch.Tensor,
    truth: torch.Tensor,
    known: torch.Tensor,
    dtype: torch.dtype,
    places: Places | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[float, str]:
    """Return the largest error over its bound, and the reason if that is more than 1.

    Errors are relative and per row of the last dimension, and of the whole. `known` are those of the host's
    reference in every row; `places` names the rows, which are the first dimension; `lse` is attention's true
    log-sum-exp of every row, which tells how large its logits are.
    """
    if result.shape != truth.shape:
        return math.inf, f"shape {list(result.shape)} instead of {list(truth.shape)}"
    if not result.numel():
        return 0.0, ""
    result, truth = result.detach().cpu().double(), truth.double()
    gaps, sizes = (result - truth).norm(dim=-1), truth.norm(dim=-1).clamp_min(LEAST_NORM)
    broken, count = ~gaps.isfinite(), gaps.numel()
    if broken.any() and bool(result.isnan().all()):  # or NaN was computed, from NaN
        return math.inf, f"it was probably not written: all {count} rows are NaN, as before the call"
    if broken.any():
        where = "" if places is None else f": {describe(broken, places)}"
        return math.inf, f"{int(broken.sum())} of {count} rows hold NaN or infinity{where}"
    errors, bounds = gaps / sizes, op_bounds(known, truth, dtype, lse)
    total = mean_over(errors, sizes)
    allowed = bounds.of_whole(bounds.rows, sizes)
    if total > allowed:  # rows that repeat err alike, such as those of all heads that see one key
        _, place, counts = truth.flatten(0, -2).unique(dim=0, return_inverse=True, return_counts=True)
        allowed = bounds.of_whole(bounds.rows * counts[place].view(sizes.shape).double().sqrt(), sizes)
    ratios = errors / bounds.rows
    worst = max(ratios.max().item(), total / max(allowed, LEAST_NORM))  # zeros are allowed no error
    return worst, "" if worst <= 1 else _reason(errors, ratios, total, allowed, places)


def _reason(
    errors: torch.Tensor, ratios: torch.Tensor, total: float, allowed: float, places: Places | None
) -> str:
    bad = ratios > 1
    if not bool(bad.any()):
        return f"relative error {total:.1e} of the whole, allowed {allowed:.1e}"
    index = int(ratios.argmax())
    common = pattern_of(bad, places)
    error, ratio = errors.flatten()[index].item(), ratios.flatten()[index].item()
    return (
        f"{int(bad.sum())} of {bad.numel()} rows are wrong{f', {common}' if common else ''}; "
        f"{name_row(index, bad.shape, places)} has relative error {error:.1e}, "
        f"{ratio:.3g} times what is allowed"
    )


def judge_lse(
    result: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, places: Places | None = None
) -> tuple[float, str]:
    """Return the largest error of a log-sum-exp over its bound, and the reason if that is more than 1."""
    if result.shape != truth.shape:
        return math.inf, f"shape {list(result.shape)} instead of {list(truth.shape)}"
    if result.dtype != torch.float32:
        return math.inf, f"dtype {result.dtype} instead of torch.float32"
    if not result.numel():
        return 0.0, ""
    result = result.detach().cpu().double()
    gap = torch.where(result == truth, 0.0, (result - truth).abs())  # -inf is -inf
    bound = ALLOWED[dtype].lse * truth.abs().clamp(1.0, torch.finfo(torch.float64).max)
    ratios = (gap / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    index = int(ratios.argmax())
    worst = ratios.flatten()[index].item()
    if worst <= 1:
        return worst, ""
    seen, true = result.flatten()[index].item(), truth.flatten()[index].item()
    bad = ratios > 1
    where = "" if places is None else f" at {describe(bad, places, index)}"
    wrong = f"; {int(bad.sum())} of {bad.numel()} are wrong" if bad.sum() > 1 else ""
    return worst, f"{seen:.5g} where the natural logarithm is {true:.5g}{where}{wrong}"


def row_errors(result: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the relative error |found - truth| / |truth| of every row, the last dimension, in float64."""
    result, truth = result.cpu().double(), truth.double()
    return (result - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(LEAST_NORM)


def relative_error(*pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return |found - truth| / |truth| over all (found, truth) pairs together, in float64."""
    wide = [(result.cpu().double(), truth.double()) for result, truth in pairs]
    error = math.hypot(*((result - truth).norm().item() for result, truth in wide))
    return error / max(math.hypot(*(truth.norm().item() for _, truth in wide)), LEAST_NORM)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits; NaN equals NaN."""
    plain = (torch.empty(x.shape, dtype=x.dtype).copy_(x.detach()) for x in (left, right))  # of usual strides
    return left.shape == right.shape and torch.equal(*(x.view(-1).view(torch.uint8) for x in plain))
