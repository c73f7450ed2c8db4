"""Cases of one shape on a device, what the reference makes of them there, and how far an op is from that."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.gpu.tuning.classes import Kind, Shape
from mla.cases.case import Lengths, OpCase
from mla.cases.played import Host, Laid
from mla.cases.stress import Stress
from mla.reference import REFERENCE
from mla_backends.api import AttentionSpec, FusedOp

SPEC = AttentionSpec(1, 512, 128, 64, 128, 0.1147, torch.bfloat16, torch.device("cpu"))
Batch = tuple[Lengths, Lengths]  # new tokens and keys of every request
# What a shape does not have: lengths that differ, end inside a page, and fill several splits or none.
RAGGED: Batch = ((1, 2, 1, 3), (700, 65, 1, 2100))
RAGGED_SMOKE: Batch = ((1, 2), (19, 33))


@dataclass(frozen=True)
class Bound:
    """A call of an op, and where it writes."""

    call: Callable[[], None]
    out: torch.Tensor
    lse: torch.Tensor | None  # if it is to be compared


class Problem:
    """A case on a device: an op is right if every row of its output is near the reference's.

    Of contexts as long as these, float64 on the host takes minutes: the reference runs on the device.
    """

    def __init__(self, case: OpCase, device: Any) -> None:
        self.case = replace(case, spec=replace(case.spec, device=torch.device(device)))

    @cached_property
    def _call(self) -> Laid:
        """The reference's call, whose operands all others share."""
        drawn = Host(replace(self.case, spec=replace(self.case.spec, device=SPEC.device)))
        call = Laid(self.case, REFERENCE[self.case.kind], host=drawn)
        call.pieces.clear()  # with copies, of gigabytes: nothing is watched
        drawn.given.clear()
        return call

    @cached_property
    def _truth(self) -> Bound:
        truth = self.bound(self._call.op, with_lse=True)
        truth.call()
        return truth

    def bound(self, op: FusedOp, *, with_lse: bool = False) -> Bound:
        """Return an op with this problem's operands and outputs of its own, which hold NaN.

        Without `with_lse` it is called as the layer calls it, with lse only if it cannot do without.
        """
        call = copy.copy(self._call)
        call.op = op
        call.prepare()
        shapes = self.case.results if with_lse or not op.lse_optional else {"out": self.case.results["out"]}
        results = {name: call.blank(name, shape) for name, shape in shapes.items()}
        arguments = {**call.arguments, "lse": None, **results}
        return Bound(
            lambda: op(*call.leading, **arguments), results["out"], results["lse"] if with_lse else None
        )

    def error(self, bound: Bound) -> float:
        """Return the largest relative difference of a row from the reference's; NaN is infinite.

        The log-sum-exp, if it was asked for, counts with its largest difference.
        """
        truth = self._truth.out.float()
        rows = (bound.out.float() - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)
        errors = [float(rows.max())]
        if bound.lse is not None and self._truth.lse is not None:
            errors.append(float((bound.lse - self._truth.lse).abs().max()))
        return math.inf if any(map(math.isnan, errors)) else max(errors)


def problem(kind: Kind, lengths: Batch, heads: int, device: Any) -> Problem:
    """Return the problem of these lengths."""
    spec = replace(SPEC, num_heads=heads)
    return Problem(OpCase(f"{kind}_attention", spec, *lengths, seed=heads, stress=Stress()), device)


def of_shape(kind: Kind, shape: Shape, device: Any) -> Problem:
    """Return the problem of equal requests."""
    lengths = (shape.queries,) * shape.batch, (shape.keys,) * shape.batch
    return problem(kind, lengths, shape.heads, device)
