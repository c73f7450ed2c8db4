"""Inputs of one shape, what the reference makes of them, and how far an op is from that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.questions.latent import SCALE, LatentBatch
from benchmarks.gpu.tuning.classes import Kind, Shape
from mla_backends.api import FusedOp, SegmentLengths

if TYPE_CHECKING:
    import torch

NOPE, ROPE, VALUE = 128, 64, 128  # channels of expanded attention
# What a shape does not have: lengths that differ, end inside a page, and fill several splits or none.
RAGGED = ((1, 2, 1, 3), (700, 65, 1, 2100))
RAGGED_SMOKE = ((1, 2), (19, 33))


@dataclass(frozen=True)
class Segments:
    """Ragged expanded attention, the last query of a segment seeing its last key."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int
    device: Any

    @cached_property
    def spec(self) -> Any:
        """What is fixed when a layer is built."""
        return LatentBatch(self.query_lens, self.kv_lens, self.heads, self.device).spec

    @cached_property
    def _operands(self) -> dict[str, torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(self.heads)
        rows = {"q": sum(self.query_lens), "k": sum(self.kv_lens), "v": sum(self.kv_lens)}
        widths = {"q": NOPE + ROPE, "k": NOPE + ROPE, "v": VALUE}
        drawn = {
            name: torch.randn(rows[name], self.heads, widths[name], generator=generator) for name in rows
        }
        return {name: one.to(self.device, torch.bfloat16) for name, one in drawn.items()}

    def state(self, op: FusedOp) -> Any:
        """Return what every call of an op shares."""
        return op.prepare(self.spec, SegmentLengths(self.query_lens, self.kv_lens, causal=True))

    def arguments(self) -> dict[str, Any]:
        """Return what every call passes, besides the state and the outputs."""
        return {**self._operands, "softmax_scale": SCALE}


@dataclass(frozen=True)
class Pages(LatentBatch):
    """Absorbed attention over pages."""

    def state(self, op: FusedOp) -> Any:
        """Return what every call of an op shares."""
        return op.prepare(self.spec, self)


Inputs = Segments | Pages


class Problem:
    """One shape: an op is right if every row of its output is near the reference's."""

    def __init__(self, kind: Kind, inputs: Inputs) -> None:
        from mla.reference import REFERENCE

        self.inputs = inputs
        self._width = inputs.spec.kv_lora_rank if kind == "latent" else VALUE
        self._reference = REFERENCE[f"{kind}_attention"]

    @cached_property
    def _truth(self) -> Bound:
        found = self.bound(self._reference, with_lse=True)
        found.call()
        return found

    def bound(self, op: FusedOp, *, with_lse: bool = False) -> Bound:
        """Return an op with this problem's operands and outputs of its own, which hold NaN.

        Without `with_lse` it is called as the layer calls it, with lse only if it cannot do without.
        """
        import torch

        inputs = self.inputs
        shape, device = (sum(inputs.query_lens), inputs.heads), inputs.device
        out = torch.full((*shape, self._width), torch.nan, dtype=torch.bfloat16, device=device)
        needed = with_lse or not op.lse_optional
        lse = torch.full(shape, torch.nan, device=device) if needed else None
        state, arguments = inputs.state(op), inputs.arguments()
        return Bound(lambda: op(state, **arguments, out=out, lse=lse), out, lse if with_lse else None)

    def error(self, found: Bound) -> float:
        """Return the largest relative difference of a row from the reference's; NaN is infinite.

        The log-sum-exp, if it was asked for, counts with its largest difference.
        """
        truth = self._truth.out.float()
        rows = (found.out.float() - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)
        errors = [float(rows.max())]
        if found.lse is not None and self._truth.lse is not None:
            errors.append(float((found.lse - self._truth.lse).abs().max()))
        return math.inf if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True)
class Bound:
    """A call of an op, and where it writes."""

    call: Callable[[], None]
    out: torch.Tensor
    lse: torch.Tensor | None  # if it is to be compared


Lengths = tuple[tuple[int, ...], tuple[int, ...]]  # new tokens and keys of every request


def problem(kind: Kind, lengths: Lengths, heads: int, device: Any) -> Problem:
    """Return the problem of these lengths."""
    form = Pages if kind == "latent" else Segments
    return Problem(kind, form(*lengths, heads, device))


def of_shape(kind: Kind, shape: Shape, device: Any) -> Problem:
    """Return the problem of equal requests."""
    lengths = (shape.queries,) * shape.batch, (shape.keys,) * shape.batch
    return problem(kind, lengths, shape.heads, device)
