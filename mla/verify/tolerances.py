"""When an output is right: how far it may be from the truth.

Truth is float64 on the host. The reference, run on the host in the op's dtype, shows how large an error is
unavoidable: an op may have twice that, or twice the dtype's rounding error, whichever is larger. Every row
counts, because an aggregate hides one wrong head; but a row in which the reference happens to be lucky may
err as much as the reference does over all rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mla.verify.places import Places, describe, name_row, pattern_of


class Allowed(NamedTuple):
    """Relative errors in one dtype."""

    layer: float  # of a layer's whole output, whatever the reference's
    layer_floor: float  # of a layer's output that the reference computes exactly; doubled, as all that follow
    op_floor: float  # of an op's result that the reference computes exactly
    lse: float  # of a log-sum-exp, not doubled


# The one table. The floors of bfloat16 and float16 are the error of rounding a row once, set by the mantissa.
#
# float32 has two floors, because it is the dtype whose rounding is not what separates right from wrong:
# - An op alone may be a softmax. Its exponents are logits, and an error in one of them, |logit| 2^-24, is a
#   relative error of the weight: 1e-6 at a logit of 16, and exponentials in hardware add 2^-22. A reference
#   that happens to be exact must not forbid that, so the floor is half of what the contract allows, 1e-5.
# - A layer's output is a sum over all heads and keys. The reference errs there by 5e-7 to 9e-7 where it was
#   measured, so the floor, 2e-7, seldom matters; 5e-6 would allow a fused op ten times the reference's error.
#   The contract's 1e-5 bounds the whole in any case.
#
# A log-sum-exp is fp32 whatever the dtype, and its error is a relative error of the merged output.
ALLOWED = {
    torch.bfloat16: Allowed(layer=2e-2, layer_floor=1.7e-3, op_floor=1.7e-3, lse=1e-3),
    torch.float16: Allowed(layer=4e-3, layer_floor=2.1e-4, op_floor=2.1e-4, lse=1e-3),
    torch.float32: Allowed(layer=1e-5, layer_floor=2e-7, op_floor=5e-6, lse=2e-5),
}
# What layers are held to (the bound on the whole output, and its floor), and ops.
BOUNDS = {dtype: (one.layer, one.layer_floor) for dtype, one in ALLOWED.items()}
UNITS = {dtype: one.op_floor for dtype, one in ALLOWED.items()}
ROW_SLACK = 1.5  # one row may be this much worse than the whole
TINY = torch.finfo(torch.float64).tiny  # stands in for the norm of zeros


def judge(
    found: torch.Tensor,
    truth: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    places: Places | None = None,
) -> tuple[float, str]:
    """Return the largest error over its bound, and the reason if that is more than 1.

    Errors are relative and per row of the last dimension, and of the whole. `reference` is the host
    reference's output; `places` names the rows, which are the first dimension.
    """
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    return judge_beside(row_errors(reference, truth), found, truth, dtype, places)


def judge_beside(
    reference_errors: torch.Tensor,
    found: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
    places: Places | None = None,
) -> tuple[float, str]:
    """Do what `judge` does, given the relative error of the reference in every row."""
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    found = found.detach().cpu().double()
    broken = (~found.isfinite()).any(-1)
    if broken.any():
        return math.inf, not_finite(found, broken, places)
    if not found.numel():
        return 0.0, ""
    errors, sizes = row_errors(found, truth), truth.double().norm(dim=-1)
    total = relative_error((found, truth))
    of_reference = ((reference_errors * sizes).norm() / sizes.norm().clamp_min(TINY)).item()
    allowed = 2 * max(of_reference, ALLOWED[dtype].op_floor)
    ratios = errors / (2 * reference_errors).clamp_min(allowed)
    worst = max(ratios.max().item(), total / allowed)
    return worst, "" if worst <= 1 else _reason(errors, ratios, total, allowed, places)


def not_finite(found: torch.Tensor, broken: torch.Tensor, places: Places | None) -> str:
    """Return what to say of an output whose rows `broken` hold NaN or infinity.

    Outputs hold NaN before the call. NaN everywhere may also have been computed, from NaN.
    """
    bad, rows = int(broken.sum()), broken.numel()
    if bool(found.isnan().all()):
        return f"it was probably not written: all {rows} rows are NaN, as before the call"
    where = "" if places is None else f": {describe(broken, places)}"
    return f"{bad} of {rows} rows hold NaN or infinity{where}"


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
        f"{name_row(_unravelled(index, bad), places)} has relative error {error:.1e}, "
        f"{ratio:.3g} times what is allowed"
    )


def _unravelled(index: int, of: torch.Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(torch.tensor(index), of.shape)]


def judge_lse(
    found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, places: Places | None = None
) -> tuple[float, str]:
    """Return the largest error of a log-sum-exp over its bound, and the reason if that is more than 1."""
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    if found.dtype != torch.float32:
        return math.inf, f"dtype {found.dtype} instead of torch.float32"
    if not found.numel():
        return 0.0, ""
    found = found.detach().cpu().double()
    gap = torch.where(found == truth, 0.0, (found - truth).abs())  # -inf is -inf
    bound = ALLOWED[dtype].lse * truth.abs().clamp(1.0, torch.finfo(torch.float64).max)
    ratios = (gap / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    index = int(ratios.argmax())
    worst = ratios.flatten()[index].item()
    if worst <= 1:
        return worst, ""
    seen, true = found.flatten()[index].item(), truth.flatten()[index].item()
    where = "" if places is None else f" at {describe(ratios > 1, places, index)}"
    return worst, f"{seen:.5g} where the natural logarithm is {true:.5g}{where}"


def row_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the relative error |found - truth| / |truth| of every row, the last dimension, in float64."""
    found, truth = found.cpu().double(), truth.double()
    return (found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(TINY)


def relative_error(*pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return |found - truth| / |truth| over all (found, truth) pairs together, in float64."""
    norms = [_norms(found.cpu().double().flatten(), truth.double().flatten()) for found, truth in pairs]
    error = math.hypot(*(gap for gap, _ in norms))
    return error / max(math.hypot(*(size for _, size in norms)), TINY)


def _norms(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Return |found - truth| and |truth|."""
    return (found - truth).norm().item(), truth.norm().item()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits; NaN equals NaN."""
    return left.shape == right.shape and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)  # a single element may keep any stride otherwise
    return plain.copy_(tensor.detach()).view(-1).view(torch.uint8)
