"""Compare the results of one op with float64: per row and overall, near the reference's error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from mla.verify.places import Places
from mla.verify.tolerances import judge_beside, judge_lse, relative_error, row_errors
from mla.verify.verdict import Check

Tensors = dict[str, torch.Tensor]


class CallTruth(Protocol):
    """What one call must write, where calls differ in operands that the truth of the problem covers."""

    def expected(self, name: str) -> torch.Tensor:
        """Return the result `name` in float64."""

    def reference_errors(self, name: str, known: torch.Tensor) -> torch.Tensor:
        """Return the reference's relative error per row, from those `known` of the problem."""


class OpChecker:
    """Judges results of one problem. The reference runs once, on the host: no device vouches for itself."""

    def __init__(self, truth: Tensors, dtype: torch.dtype, run_reference: Callable[[], Tensors]) -> None:
        self._truth, self._dtype, self._run_reference = truth, dtype, run_reference
        self._reference: Tensors | None = None

    def check(
        self, found: Tensors, truth: CallTruth, damage: str = "", places: Places | None = None
    ) -> Check:
        """Return "ok", or "wrong" with a reason that says where.

        `damage` is a fault found by the caller; `places` names the rows.
        """
        ratios, reasons = [], [damage] * bool(damage)
        pairs = {name: (result, truth.expected(name)) for name, result in found.items()}
        for name, pair in pairs.items():
            ratio, reason = self._judge(name, *pair, truth, places)
            ratios.append(ratio)
            reasons += [f"{name}: {reason}"] * bool(reason)
        worst = max(ratios)
        error = relative_error(*(pair for name, pair in pairs.items() if name != "lse"))
        return Check(
            status="wrong" if reasons else "ok",
            error_ratio=worst if math.isfinite(worst) else None,
            relative_error=error if math.isfinite(error) else None,
            reason="; ".join(reasons),
        )

    def _judge(
        self,
        name: str,
        result: torch.Tensor,
        expected: torch.Tensor,
        truth: CallTruth,
        places: Places | None,
    ) -> tuple[float, str]:
        if name == "lse":
            return judge_lse(result, expected, self._dtype, places)
        errors = truth.reference_errors(name, self._errors()[name])
        lse = truth.expected("lse") if "lse" in self._truth else None
        return judge_beside(errors, result, expected, self._dtype, places, lse)

    def _errors(self) -> Tensors:
        """Return the reference's relative error in every row, NaN where it did not run."""
        if self._reference is None:
            found = self._run_reference()
            errors = {name: row_errors(result, self._truth[name]) for name, result in found.items()}
            self._reference = {name: one for name, one in errors.items() if name != "lse"}
        return self._reference
