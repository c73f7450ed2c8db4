"""Compare an implementation's outputs with the float64 oracle.

Every output row is judged, because an aggregate hides one wrong token. A layer with fused ops must stay
within twice the error of the reference in the same dtype, per row and overall; every implementation must stay
within the absolute bounds (six correct ones were measured: at worst 1.6e-2 in bf16 and 1.3e-6 in fp32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla.verify.tolerances import BOUNDS, ROW_SLACK, relative_error, row_errors
from mla.verify.verdict import Check


@dataclass
class Checker:
    """Judges outputs of one scenario. `reference_outputs` is called once, when first needed."""

    expected: torch.Tensor  # [inputs, T, d] float64
    dtype: torch.dtype
    reference_outputs: Callable[[], torch.Tensor]
    _reference: torch.Tensor | None = None

    def check(self, outputs: torch.Tensor, held_to_reference: bool) -> Check:
        """Return "ok", or "wrong" with a reason that says where."""
        found = outputs.cpu().double()
        broken = (~found.isfinite()).any(-1)
        if broken.any():
            return Check(
                status="wrong",
                reason=f"{int(broken.sum())} of {broken.numel()} output rows hold NaN or infinity",
            )
        errors = row_errors(found, self.expected)
        bound, rows = self._bounds(held_to_reference)
        total = relative_error((found, self.expected))
        ratios = errors / rows
        worst = max(ratios.max().item(), total / bound)
        return Check(
            status="ok" if worst <= 1 else "wrong",
            error_ratio=worst,
            relative_error=total,
            reason="" if worst <= 1 else self._reason(ratios, errors),
        )

    def _bounds(self, held_to_reference: bool) -> tuple[float, torch.Tensor]:
        """Return the bounds for the whole output and for every row [inputs, T]."""
        bound, unit = BOUNDS[self.dtype]
        rows = torch.full(self.expected.shape[:2], ROW_SLACK * bound, dtype=torch.float64)
        if not held_to_reference:
            return bound, rows
        if self._reference is None:
            self._reference = self.reference_outputs().cpu().double()
        total = relative_error((self._reference, self.expected))
        own_rows = 2 * row_errors(self._reference, self.expected).clamp_min(unit)
        return min(bound, 2 * max(total, unit)), torch.minimum(rows, own_rows)

    def _reason(self, ratios: torch.Tensor, errors: torch.Tensor) -> str:
        step, token = divmod(int(ratios.argmax()), ratios.shape[1])
        bad = int((ratios > 1).sum())
        return (
            f"{bad} of {ratios.numel()} output rows are too far from the oracle; worst is token {token} of "
            f"step {step} with relative error {errors[step, token]:.1e}"
        )
