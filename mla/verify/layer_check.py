"""Compare an implementation's outputs with the float64 oracle.

Every output row is judged, because an aggregate hides one wrong token. A layer with fused ops must stay
within twice the error of the reference in the same dtype, per row and overall; every implementation must stay
within the absolute bounds (six correct ones were measured: at worst 1.6e-2 in bf16 and 1.3e-6 in fp32).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from mla.verify.places import Places, pattern_of
from mla.verify.tolerances import BOUNDS, ROW_SLACK, TINY, relative_error, row_errors
from mla.verify.verdict import Check


@dataclass(frozen=True)
class Forward:
    """The outputs [T, d] of one forward and what they should be. `where` names it in a reason."""

    step: int  # of the scenario's inputs, whose rows have the same lengths
    found: torch.Tensor
    expected: torch.Tensor  # float64, on the host
    where: str
    places: Callable[[], Places] | None = None  # of its rows, asked for when some are wrong

    def name(self, row: int) -> str:
        """Return what a row is and which forward it belongs to."""
        named = f"token {row}" if self.places is None else self.places().name(row)
        return f"{named} of {self.where}"

    def common(self, bad: torch.Tensor) -> str:
        """Return what bad rows [T] have in common, as a clause to append; "" where nothing is clear."""
        found = "" if self.places is None else pattern_of(bad, self.places())
        return {"": "", "every row": "; so is every row of it"}.get(found, f"; {found}")


@dataclass
class Checker:
    """Judges outputs of one scenario. `reference_outputs` is called once, when first needed."""

    expected: torch.Tensor  # [inputs, T, d] float64
    dtype: torch.dtype
    reference_outputs: Callable[[], torch.Tensor]
    _kept: dict[bool, tuple[float, torch.Tensor]] = field(default_factory=dict)  # bounds, by held or not

    def check(self, outputs: torch.Tensor, held_to_reference: bool) -> Check:
        """Judge the outputs of all steps: "ok", or "wrong" with a reason that says where."""
        pairs = zip(outputs.unbind(), self.expected.unbind(), strict=True)
        forwards = (Forward(step, *pair, f"step {step}") for step, pair in enumerate(pairs))
        return self.check_forwards(forwards, held_to_reference)

    def check_forwards(self, forwards: Iterable[Forward], held_to_reference: bool) -> Check:
        """Judge any number of forwards, whatever inputs each had."""
        bound, rows = self._bounds(held_to_reference)
        tally = _Tally(bound, rows)
        for forward in forwards:
            tally.add(forward)
        return tally.verdict()

    def _bounds(self, held_to_reference: bool) -> tuple[float, torch.Tensor]:
        """Return the bounds for the whole output and for every row [inputs, T], made once."""
        if held_to_reference not in self._kept:
            self._kept[held_to_reference] = self._make_bounds(held_to_reference)
        return self._kept[held_to_reference]

    def _make_bounds(self, held_to_reference: bool) -> tuple[float, torch.Tensor]:
        """Return what `_bounds` does.

        A row may always have twice the reference's error of the whole, and some: the reference is lucky in
        some rows, and a right op need not be in the same ones.
        """
        bound, unit = BOUNDS[self.dtype]
        rows = torch.full(self.expected.shape[:2], ROW_SLACK * bound, dtype=torch.float64)
        if not held_to_reference:
            return bound, rows
        reference = self.reference_outputs()
        total = max(relative_error((reference, self.expected)), unit)
        own_rows = 2 * row_errors(reference, self.expected).clamp_min(ROW_SLACK * total)
        return min(bound, 2 * total), torch.minimum(rows, own_rows)


@dataclass
class _Tally:
    """What was found in the forwards so far."""

    bound: float
    rows: torch.Tensor
    count: int = 0
    bad: int = 0
    broken: int = 0  # rows that hold NaN or infinity
    worst: float = 0.0  # error of a row over its bound
    place: str = ""  # of the worst row
    _squares: list[tuple[float, float]] = field(default_factory=list)  # error and size of each forward

    def add(self, forward: Forward) -> None:
        gaps = forward.found.cpu().double() - forward.expected
        size, gap = forward.expected.norm(dim=-1), gaps.norm(dim=-1)
        self.count += gap.numel()
        broken = ~gap.isfinite()
        if bool(broken.any()):
            if not self.broken:
                first = forward.name(int(broken.nonzero()[0, 0]))
                self.place = f"the first is {first}{forward.common(broken)}"
            self.broken += int(broken.sum())
            return
        self._squares.append((gap.norm().item(), size.norm().item()))
        errors = gap / size.clamp_min(TINY)
        ratios = errors / self.rows[forward.step]
        self.bad += int((ratios > 1).sum())
        worst = ratios.max().item()
        if worst > self.worst:
            self.worst = worst
            token = int(ratios.argmax())
            if worst > 1 and not self.broken:
                named = f"{forward.name(token)} with relative error {errors[token]:.1e}"
                self.place = f"{named}{forward.common(ratios > 1)}"

    def verdict(self) -> Check:
        if self.broken:
            return Check(
                status="wrong",
                reason=f"{self.broken} of {self.count} output rows hold NaN or infinity; {self.place}",
            )
        errors, sizes = zip(*self._squares, strict=True) if self._squares else ((0.0,), (0.0,))
        total = math.hypot(*errors) / max(math.hypot(*sizes), TINY)
        worst = max(self.worst, total / self.bound)
        return Check(
            status="ok" if worst <= 1 else "wrong",
            error_ratio=worst,
            relative_error=total,
            reason="" if worst <= 1 else self._reason(total),
        )

    def _reason(self, total: float) -> str:
        if not self.bad:
            return f"relative error {total:.1e} of the whole output, allowed {self.bound:.1e}"
        return f"{self.bad} of {self.count} output rows are too far from the oracle; worst is {self.place}"
