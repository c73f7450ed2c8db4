"""Compare the results of one op with float64: per row and overall, at most twice the reference's error."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mla.verify.places import Places
from mla.verify.tolerances import judge, judge_lse, relative_error
from mla.verify.verdict import Check

Tensors = dict[str, torch.Tensor]


class OpChecker:
    """Judges results of one problem. The reference runs once, on the host: no device vouches for itself."""

    def __init__(self, truth: Tensors, dtype: torch.dtype, run_reference: Callable[[], Tensors]) -> None:
        self._truth, self._dtype, self._run_reference = truth, dtype, run_reference
        self._reference: Tensors | None = None

    def check(self, found: Tensors, damage: str = "", places: Places | None = None) -> Check:
        """Return "ok", or "wrong" with a reason that says where.

        `damage` is a fault found by the caller; `places` names the rows.
        """
        ratios, reasons = [], [damage] * bool(damage)
        for name, result in found.items():
            ratio, reason = self._judge(name, result, places)
            ratios.append(ratio)
            reasons += [f"{name}: {reason}"] * bool(reason)
        worst = max(ratios)
        return Check(
            status="wrong" if reasons else "ok",
            error_ratio=worst if math.isfinite(worst) else None,
            relative_error=self._relative_error(found),
            reason="; ".join(reasons),
        )

    def _judge(self, name: str, result: torch.Tensor, places: Places | None) -> tuple[float, str]:
        if name == "lse":
            return judge_lse(result, self._truth[name], self._dtype, places)
        if self._reference is None:
            self._reference = self._run_reference()
        return judge(result, self._truth[name], self._reference[name], self._dtype, places)

    def _relative_error(self, found: Tensors) -> float | None:
        """Return the relative error of all results together, except log-sum-exps."""
        error = relative_error(
            *((result, self._truth[name]) for name, result in found.items() if name != "lse")
        )
        return error if math.isfinite(error) else None
