"""When an output is right: the one criterion that every op is held to.

Truth is float64 on the host. The reference, run on the host in the op's dtype, says how large an error is
honest: an op may have twice that, or twice the dtype's rounding error, whichever is more. Every row counts,
because an aggregate hides one wrong head.
"""

from __future__ import annotations

import math

import torch

#: Relative error of rounding once. A matter of the mantissa; for fp32 the contract's 1e-5, halved.
UNITS = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 5e-6}
#: A log-sum-exp is fp32 whatever the dtype, and its error is a relative error of the merged output.
LSE_BOUNDS = {torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float32: 2e-5}


def judge(
    found: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype
) -> tuple[float, str]:
    """Return the largest error over its bound, and the reason if that is more than 1.

    Errors are relative and per row of the last dimension, and of the whole. `reference` is the host
    reference's output.
    """
    if found.shape != truth.shape:
        return math.inf, f"shape {list(found.shape)} instead of {list(truth.shape)}"
    found, reference = found.detach().cpu().double(), reference.double()
    broken = (~found.isfinite()).any(-1)
    if broken.any():
        return math.inf, f"{int(broken.sum())} of {broken.numel()} rows hold NaN or infinity"
    if not found.numel():
        return 0.0, ""
    unit = UNITS[dtype]
    errors = _relative(found, truth)
    ratios = errors / (2 * _relative(reference, truth).clamp_min(unit))
    total = _relative(found.flatten(), truth.flatten()).item()
    total_bound = 2 * max(_relative(reference.flatten(), truth.flatten()).item(), unit)
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


def _relative(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return |found - truth| / |truth| over the last dimension, in float64."""
    tiny = torch.finfo(torch.float64).tiny
    return (found - truth).norm(dim=-1) / truth.double().norm(dim=-1).clamp_min(tiny)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Say whether two tensors hold the same bits; NaN equals NaN."""
    return left.shape == right.shape and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)  # a single element may keep any stride otherwise
    return plain.copy_(tensor.detach()).view(-1).view(torch.uint8)


#: dtype -> (bound on the relative error of the whole output, unit of rounding)
BOUNDS = {
    torch.bfloat16: (2e-2, 1.7e-3),
    torch.float16: (4e-3, 2.1e-4),
    torch.float32: (1e-5, 2e-7),
}


#: One row may be this much worse than the whole.
ROW_SLACK = 1.5
