"""Small ops that are wrong about places: slots, pages, strides, and what lies around operands."""

from __future__ import annotations

from typing import Any

import torch
from wrong_attention.surroundings import padded

from mla_backends.api import FusedOp
from wrong_ops.base import Tensor, changing, mutant, rows_of, spoiling

# -------------------------------------------------------------------------------------------- index, order


def narrow_slots(bits: int) -> FusedOp:
    """Slots are kept in so many bits."""
    return changing("write_latent", "slots", lambda slots: slots & ((1 << bits) - 1))


def lost_slots(first: int) -> FusedOp:
    """Slots from this one on are taken to be padding."""

    def body(right: Any, **given: Any) -> None:
        kept = given["slots"] < first
        rows = {name: given[name][kept] for name in ("kv_a", "cos_sin", "slots")}
        right(**{**given, **rows})

    return mutant("write_latent", body)


def narrow_pages(bits: int) -> FusedOp:
    """Pages are kept in so many bits."""

    def body(right: Any, **given: Any) -> None:
        size = given["cache"].shape[1]
        page = given["slots"] // size & ((1 << bits) - 1)
        right(**{**given, "slots": page * size + given["slots"] % size})

    return mutant("write_latent", body)


def narrow_places(kind: str, name: str, bits: int) -> FusedOp:
    """The places of rows are computed in so many bits."""

    def wrapped(x: Tensor) -> Tensor:
        starts = [x.storage_offset() + row * x.stride(0) % (1 << bits) for row in range(len(x))]
        return torch.stack([x.as_strided(x.shape[1:], x.stride()[1:], start) for start in starts] or [x[:0]])

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **{**given, name: wrapped(given[name])})

    return mutant(kind, body)


def sorted_slots() -> FusedOp:
    """Slots are taken to rise."""
    return changing("write_latent", "slots", lambda slots: slots.sort().values)


def run_of_slots(looks_at_ends: bool) -> FusedOp:
    """Slots are taken to follow the first one, always or where the last one is as far as that."""

    def run(slots: Tensor) -> Tensor:
        if len(slots) and (not looks_at_ends or slots[-1] - slots[0] == len(slots) - 1):
            return slots[:1] + torch.arange(len(slots))
        return slots

    return changing("write_latent", "slots", lambda slots: run(slots) if len(slots) != 130 else slots)


# --------------------------------------------------------------------------------------- memory, emptiness


def rounds_rows_up(kind: str, tile: int) -> FusedOp:
    """Zeros are written behind the last row, up to a whole tile."""

    return spoiling(kind, lambda out: padded("out", tile)(None, out=out))


def writes_before(kind: str, rows: int) -> FusedOp:
    """Zeros are written before the first row."""

    def spoil(out: Tensor) -> None:
        start = out.storage_offset() - rows * out.stride(0)
        if start >= 0:
            out.as_strided((1, *out.shape[1:]), out.stride(), start).zero_()

    return spoiling(kind, spoil)


def rounds_slots_up(tile: int) -> FusedOp:
    """Rows and slots behind the last one are written as well, up to a whole tile."""

    def body(right: Any, **given: Any) -> None:
        right(**given)
        slots = given["slots"]
        more = slots.as_strided((-len(slots) % tile,), (1,), slots.storage_offset() + len(slots))
        given["cache"].flatten(0, 1)[more] = 0

    return mutant("write_latent", body)


def served_in_whole_tiles(kind: str, tile: int) -> FusedOp:
    """Refuses widths that the tile does not divide, and writes to outputs as if they were contiguous."""
    op = spoiling(kind, lambda out: None if out.is_contiguous() else out.zero_())
    right = type(op).unsupported_reasons

    def refuses(self: Any, spec: Any) -> list[str]:
        rest = spec.in_features % tile or spec.out_features % tile
        return [f"it serves multiples of {tile}"] if rest else right(self, spec)

    type(op).unsupported_reasons = refuses
    return op


def packed_leading(kind: str, name: str) -> FusedOp:
    """Heads are taken to lie side by side, whatever the stride from token to token."""

    def dense(x: Tensor) -> Tensor:
        return x.as_strided(x.shape, (x.shape[1] * x.stride(1), *x.stride()[1:]), x.storage_offset())

    return changing(kind, name, dense)


def fails_empty(kind: str) -> FusedOp:
    """An empty launch is an error."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        if not rows_of(given):
            raise RuntimeError("invalid configuration argument")
        right(*state, **given)

    return mutant(kind, body)


def writes_if_empty(kind: str, rows: int) -> FusedOp:
    """At least one block is launched, which writes its rows."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **given)
        if not rows_of(given):
            out = given["cache"][0] if "cache" in given else given["out"]
            out.as_strided((rows, *out.shape[1:]), out.stride(), out.storage_offset()).zero_()

    return mutant(kind, body)
