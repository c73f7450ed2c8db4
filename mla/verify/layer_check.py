"""Compare an implementation's outputs with the float64 oracle.

Every output row is judged, because an aggregate hides one wrong token. Every implementation must stay within
the table of `mla.verify.tolerances` (six correct ones were measured: at worst 1.6e-2 in bf16 and 1.3e-6 in
fp32), and a layer with fused ops near the error of the reference in the same dtype.

The cache is poisoned, to expose a kernel that reads memory it does not own. Pages that no request will own
hold NaN. Slots past a request's end, inside pages it owns, hold NaN for ops that declare `nan_safe_tail`,
else a large finite number, because a kernel may read them and multiply by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mla.cache import LatentCache
from mla.verify.places import Places, pattern_of
from mla.verify.tolerances import LEAST_NORM, Bounds, layer_bounds, mean_over, row_errors, table_decides
from mla.verify.verdict import Check


@dataclass(frozen=True)
class Forward:
    """The outputs [T, d] of one forward and what they should be. `where` names it in a reason."""

    step: int  # of the scenario's inputs, whose rows have the same lengths
    actual: torch.Tensor
    expected: torch.Tensor  # float64, on the host
    where: str
    places: Callable[[], Places] | None = None  # of its rows, asked for when some are wrong

    def name(self, row: int) -> str:
        """Return what a row is and which forward it belongs to."""
        named = f"token {row}" if self.places is None else self.places().name(row)
        return f"{named} of {self.where}"

    def common(self, bad: torch.Tensor) -> str:
        """Return what bad rows [T] have in common, as a clause to append; "" where nothing is clear."""
        pattern = "" if self.places is None else pattern_of(bad, self.places())
        return {"": "", "every row": "; so is every row of it"}.get(pattern, f"; {pattern}")


@dataclass
class Checker:
    """Judges outputs of one scenario. `reference_outputs` is called once, when first needed."""

    expected: torch.Tensor  # [inputs, T, d] float64
    dtype: torch.dtype
    reference_outputs: Callable[[], torch.Tensor]
    _kept: dict[bool, Bounds] = field(default_factory=dict)  # by held or not

    def check(self, outputs: torch.Tensor, held_to_reference: bool) -> Check:
        """Judge the outputs of all steps: "ok", or "wrong" with a reason that says where."""
        pairs = zip(outputs.unbind(), self.expected.unbind(), strict=True)
        forwards = (Forward(step, *pair, f"step {step}") for step, pair in enumerate(pairs))
        return self.check_forwards(forwards, held_to_reference)

    def check_forwards(self, forwards: Iterable[Forward], held_to_reference: bool) -> Check:
        """Judge any number of forwards, whatever inputs each had."""
        bounds, parts, worst, place = self._bounds(held_to_reference), list[torch.Tensor](), 1.0, ""
        for forward in forwards:
            size = forward.expected.norm(dim=-1)
            errors = (forward.actual.cpu().double() - forward.expected).norm(dim=-1)
            errors = (errors / size.clamp_min(LEAST_NORM)).nan_to_num(nan=math.inf, posinf=math.inf)
            parts.append(torch.stack((errors, bounds.rows[forward.step], size)))
            ratios, broken = errors / parts[-1][1], errors.isinf()
            if ratios.max() > worst:
                worst, row = ratios.max().item(), int(ratios.argmax())
                what, bad = f" with relative error {errors[row]:.1e}", ratios > 1
                if bool(broken.any()):
                    what, bad = "", broken
                place = forward.name(row) + what + forward.common(bad)
        if not parts:
            return Check(status="wrong", reason="there are no outputs to judge")
        errors, allowed, sizes = torch.cat(parts, dim=1)
        infinite, far = int(errors.isinf().sum()), int((errors > allowed).sum())
        if infinite:
            what = f"{infinite} of {len(errors)} output rows hold NaN or infinity; the first is {place}"
            return Check(status="wrong", reason=what)
        total, bound = mean_over(errors, sizes), bounds.of_whole(allowed, sizes)
        ratio = max((errors / allowed).max().item(), total / bound)
        reason = "" if ratio <= 1 else f"relative error {total:.1e} of the whole output, allowed {bound:.1e}"
        if far:
            reason = f"{far} of {len(errors)} output rows are too far from the oracle; worst is {place}"
        status: Literal["ok", "wrong"] = "wrong" if reason else "ok"
        return Check(status=status, error_ratio=ratio, relative_error=total, reason=reason)

    def _bounds(self, held_to_reference: bool) -> Bounds:
        """Return the bounds, those of rows [inputs, T], made once. The reference runs if it matters."""
        held = held_to_reference and not table_decides(self.dtype)
        if held not in self._kept:
            errors = row_errors(self.reference_outputs(), self.expected) if held else None
            self._kept[held] = layer_bounds(errors, self.expected, self.dtype)
        return self._kept[held]


TAIL = 1e4
FINITE = 0x42  # in every byte: numbers of up to 1e4 in all formats of a cache


def stands_for(value: float, dtype: torch.dtype) -> float:
    """Return what stands for a number in memory of this dtype: for NaN among integers, their largest.

    Bytes stand for numbers of some format: 255 each is NaN, or nearly, and `FINITE` is finite.
    """
    if dtype.is_floating_point:
        return value
    most = torch.iinfo(dtype).max
    return most if math.isnan(value) else int(value) if value <= most else FINITE


class Poison:
    """What to write where, computed once for sequences that will grow to `final_lens`.

    `of_index`: in the pages of index keys, in place of those of latents.
    """

    def __init__(
        self,
        cache: LatentCache,
        sequences: Sequence[int],
        final_lens: Sequence[int],
        nan_safe_tail: bool,
        of_index: bool = False,
    ) -> None:
        self._pages = cache.index_pages if of_index else cache.pages
        self._codec = cache.index_codec if of_index else None  # whose rows are spread over a page
        history = [cache.length(sequence) for sequence in sequences]
        kept = torch.cat([cache.slots(sequence) for sequence in sequences])
        growth = [final - now for final, now in zip(final_lens, history, strict=True)]
        cache.extend(sequences, growth)
        owned = torch.cat([cache.slots(sequence) for sequence in sequences])
        for sequence, length in reversed(list(zip(sequences, history, strict=True))):
            cache.truncate(sequence, length)  # last first, to restore the free list
        kind = self._pages.dtype
        nothing, tail = (stands_for(value, kind) for value in (torch.nan, TAIL))
        value = torch.full((cache.num_pages, cache.page_size), nothing, dtype=kind, device=owned.device)
        value[owned // cache.page_size] = nothing if nan_safe_tail else tail
        free = torch.ones(value.numel(), dtype=torch.bool, device=owned.device)
        free[kept] = False
        self._slots = free.nonzero()[:, 0]
        self._rows = value.view(-1)[self._slots, None]

    def apply(self) -> None:
        """Overwrite every slot that holds no history."""
        self._fill(self._slots, self._rows)

    def clear(self, slots: torch.Tensor) -> None:
        """Overwrite slots [n] int64 with NaN, or what stands for it."""
        nothing = stands_for(torch.nan, self._pages.dtype)
        self._fill(slots, self._pages.new_full((len(slots), 1), nothing))

    def _fill(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write what rows [n, 1] hold to all numbers or bytes of slots [n]."""
        wide = rows.expand(-1, self._pages.shape[-1])
        for layer in self._pages:
            if self._codec is None:
                layer.flatten(0, 1).index_copy_(0, slots, wide)
            else:
                self._codec.put(layer, slots, wide)
