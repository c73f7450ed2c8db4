"""When an output is right: how far it may be from the truth.

Truth is float64 on the host. The reference, run on the host in the op's dtype, shows how large an error is
unavoidable: an op may have twice that, or twice the dtype's rounding error, whichever is larger. Every row
counts, because an aggregate hides one wrong head.
"""

from __future__ import annotations

import math

import torch

# For single ops: relative error of rounding once, set by the mantissa; for fp32 half the contract's 1e-5.
UNITS = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 5e-6}
# A log-sum-exp is fp32 whatever the dtype, and its error is a relative error of the merged output.
LSE_BOUNDS = {torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float32: 2e-5}
# For whole layers: bound on the relative error of the whole output, and the error of rounding once.
BOUNDS = {
    torch.bfloat16: (2e-2, 1.7e-3),
    torch.float16: (4e-3, 2.1e-4),
    torch.float32: (1e-5, 2e-7),
}
ROW_SLACK = 1.5  # one row may be this much worse than the whole
TINY = torch.finfo(torch.float64).tiny  # stands in for the norm of zeros


def judge(
    found: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype
) -> tuple[float, str]:
    """Return the largest error over its bound, and the reason if that is more than 1.

    Errors are relative and per row of the last dimension, and of the whole. `reference` is the host
    reference's output.
    """
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    return judge_beside(row_errors(reference, truth), found, truth, dtype)


def judge_beside(
    reference_errors: torch.Tensor, found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> tuple[float, str]:
    """Do what `judge` does, given the relative error of the reference in every row."""
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    found = found.detach().cpu().double()
    broken = (~found.isfinite()).any(-1)
    if broken.any():
        return math.inf, f"{int(broken.sum())} of {broken.numel()} rows hold NaN or infinity"
    if not found.numel():
        return 0.0, ""
    unit = UNITS[dtype]
    errors = row_errors(found, truth)
    ratios = errors / (2 * reference_errors.clamp_min(unit))
    sizes = truth.double().norm(dim=-1).clamp_min(TINY)
    total = ((errors * sizes).norm() / sizes.norm()).item()
    total_bound = 2 * max(((reference_errors * sizes).norm() / sizes.norm()).item(), unit)
    worst = max(ratios.max().item(), total / total_bound)
    return worst, "" if worst <= 1 else _reason(errors, ratios, total, total_bound)


def _reason(errors: torch.Tensor, ratios: torch.Tensor, total: float, total_bound: float) -> str:
    bad = int((ratios > 1).sum())
    if not bad:
        return f"relative error {total:.1e} of the whole, allowed {total_bound:.1e}"
    index = int(ratios.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(index), ratios.shape)]
    error, ratio = errors.flatten()[index].item(), ratios.flatten()[index].item()
    return (
        f"{bad} of {ratios.numel()} rows are wrong; row {place} has relative error {error:.1e}, "
        f"{ratio:.3g} times what is allowed"
    )


def judge_lse(found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> tuple[float, str]:
    """Return the largest error of a log-sum-exp over its bound, and the reason if that is more than 1."""
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    if found.dtype != torch.float32:
        return math.inf, f"dtype {found.dtype} instead of torch.float32"
    if not found.numel():
        return 0.0, ""
    found = found.detach().cpu().double()
    gap = torch.where(found == truth, 0.0, (found - truth).abs())  # -inf is -inf
    bound = LSE_BOUNDS[dtype] * truth.abs().clamp(1.0, torch.finfo(torch.float64).max)
    ratios = (gap / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    index = int(ratios.argmax())
    worst = ratios.flatten()[index].item()
    seen, true = found.flatten()[index].item(), truth.flatten()[index].item()
    return worst, "" if worst <= 1 else f"{seen:.5g} where the natural logarithm is {true:.5g}"


def row_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the relative error |found - truth| / |truth| of every row, the last dimension, in float64."""
    found, truth = found.cpu().double(), truth.double()
    return (found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(TINY)


def relative_error(*pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return |found - truth| / |truth| over all (found, truth) pairs together, in float64."""
    wide = [(found.cpu().double().flatten(), truth.double().flatten()) for found, truth in pairs]
    error = math.hypot(*((found - truth).norm().item() for found, truth in wide))
    return error / max(math.hypot(*(truth.norm().item() for _, truth in wide)), TINY)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits; NaN equals NaN."""
    return left.shape == right.shape and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)  # a single element may keep any stride otherwise
    return plain.copy_(tensor.detach()).view(-1).view(torch.uint8)
