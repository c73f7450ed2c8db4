"""When an output is right: row by row and as a whole, within the bounds of `mla.verify.bounds`."""

from __future__ import annotations

import math

import torch

from mla.verify.bounds import ALLOWED, TINY, op_bounds
from mla.verify.places import Places, describe, name_row, pattern_of


def judge(
    found: torch.Tensor,
    truth: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    places: Places | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[float, str]:
    """Return the largest error over its bound, and the reason if that is more than 1.

    Errors are relative and per row of the last dimension, and of the whole. `reference` is the host
    reference's output; `places` names the rows, which are the first dimension; `lse` is attention's true
    log-sum-exp of every row, which tells how large its logits are.
    """
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    return judge_beside(row_errors(reference, truth), found, truth, dtype, places, lse)


def judge_beside(
    reference_errors: torch.Tensor,
    found: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
    places: Places | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[float, str]:
    """Do what `judge` does, given the relative error of the reference in every row."""
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    found, truth = found.detach().cpu().double(), truth.double()
    broken = (~found.isfinite()).any(-1)
    if broken.any():
        return math.inf, not_finite(found, broken, places)
    if not found.numel():
        return 0.0, ""
    errors, sizes = row_errors(found, truth), truth.norm(dim=-1)
    bounds = op_bounds(reference_errors, truth, dtype, lse)
    total, allowed = relative_error((found, truth)), bounds.of_whole(bounds.rows, sizes)
    ratios = errors / bounds.rows
    worst = max(ratios.max().item(), total / max(allowed, TINY))  # zeros are allowed no error
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
