"""Projections, norms, rotations and cache writes that are wrong in one way: the ways in which kernels fail.

Each function returns a new op; its arguments are the numbers that a real bug might have had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla.reference import REFERENCE
from mla_backends.api import FusedOp, Packed

Tensor = torch.Tensor
Body = Callable[..., None]
SMALL_OPS = ("linear", "batched_linear", "rms_norm", "rotate_query", "write_latent")
# Checks of what an op computes, whose mutants are in `tests/conformance/test_small_op_mutants.py`.
FORMULAS = {
    *(f"linear.{name}" for name in ("product", "pack", "bias")),
    *(f"batched_linear.{name}" for name in ("product", "pack")),
    *(f"rms_norm.{name}" for name in ("formula", "eps", "large")),
    *(f"rotate_query.{name}" for name in ("interleaved", "halves", "in_place")),
    *(
        f"write_latent.{name}"
        for name in ("formula", "halves", "eps", "large", "page_sizes", "untouched", "other_widths")
    ),
}


def mutant(kind: str, body: Body) -> Any:
    """Return an op whose call is `body(right, *packed, **tensors)`; `right` is the right call."""
    base = type(REFERENCE[kind])

    def call(self: Any, *state: Any, **tensors: Any) -> None:
        body(super(changed, self).__call__, *state, **tensors)

    changed = type("Mutant", (base,), {"__call__": call})
    return changed()


def changing(kind: str, name: str, change: Callable[[Tensor], Any]) -> Any:
    """Return an op that is given another tensor than it should be."""
    return mutant(kind, lambda right, *state, **given: right(*state, **{**given, name: change(given[name])}))


def spoiling(kind: str, spoil: Callable[[Tensor], object], name: str = "out") -> Any:
    """Return an op that is right and then changes one of its tensors."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **given)
        spoil(given[name])

    return mutant(kind, body)


def rows_of(given: dict[str, Any]) -> int:
    return len(given["kv_a" if "cache" in given else "x"])


def written(given: dict[str, Any], first: int = 0, last: int | None = None) -> Tensor:
    """Return a copy of the rows that were written, from `first` to `last`."""
    if "cache" in given:
        return given["cache"].flatten(0, 1)[given["slots"][first:last]]
    return given["out"][first:last].clone()


def overwrite(given: dict[str, Any], rows: Any, first: int = 0, last: int | None = None) -> None:
    """Write other rows to where the op wrote."""
    if "cache" in given:
        given["cache"].flatten(0, 1)[given["slots"][first:last]] = rows
    else:
        given["out"][first:last] = rows


def after(kind: str, spoil: Callable[[dict[str, Any]], None]) -> Any:
    """Return an op that is right and then does something to what it was given."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **given)
        spoil(given)

    return mutant(kind, body)


def as_contiguous(x: Tensor) -> Tensor:
    """Read memory as a kernel does that takes its input to be contiguous."""
    return x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())


# ------------------------------------------------------------------------------------------------- grid


def lost_from(kind: str, row: int) -> FusedOp:
    """Rows from this one on are zeros: the grid was made for fewer."""
    return after(kind, lambda given: overwrite(given, 0, row) if rows_of(given) > row else None)


def lost_at(kind: str, rows: int) -> FusedOp:
    """With just as many rows, the last one is forgotten."""
    return after(kind, lambda given: overwrite(given, 0, rows - 1) if rows_of(given) == rows else None)


def lost_rest(kind: str, tile: int, rest: int) -> FusedOp:
    """Where a tile of rows leaves this rest, the last row is forgotten."""

    def spoil(given: dict[str, Any]) -> None:
        if rows_of(given) % tile == rest and rows_of(given) > tile:
            overwrite(given, 0, rows_of(given) - 1)

    return after(kind, spoil)


def lost_blocks(kind: str, most: int) -> FusedOp:
    """A grid of one block per token and head has at most so many."""
    return spoiling(kind, lambda out: out.view(-1, out.shape[2])[most:].zero_() if out.is_contiguous() else 0)


def lost_outputs_from(kind: str, column: int) -> FusedOp:
    """Outputs from this one on are zeros: the grid was made for fewer."""
    return spoiling(kind, lambda out: out[..., column:].zero_())


def biased_wrong(kind: str, row: int, column: int) -> FusedOp:
    """A bias is not added from this row and column on."""

    def spoil(given: dict[str, Any]) -> None:
        if given["bias"] is not None:
            given["out"][row:, column:] -= given["bias"][column:]

    return after(kind, spoil)


def halves_lost_from(kind: str, row: int) -> FusedOp:
    """Rotated in halves, rows from this one on are zeros."""
    return after(kind, lambda given: None if given["interleaved"] else overwrite(given, 0, row))


# ------------------------------------------------------------------------------------------------ tiles


def halves_lost_heads(kind: str, head: int) -> FusedOp:
    """Rotated in halves, heads from this one on are zeros."""
    return after(kind, lambda given: None if given["interleaved"] else given["out"][:, head:].zero_())


def lost_channels_from(kind: str, most: int) -> FusedOp:
    """Channels from this one on are zeros, if there are other channels than 64."""
    return spoiling(kind, lambda out: out[..., most:].zero_() if out.shape[-1] != 64 else None)


def lost_heads(kind: str, tile: int, rest: int) -> FusedOp:
    """Where a tile of heads leaves this rest, the last head is forgotten."""
    return spoiling(kind, lambda out: out[:, -1].zero_() if out.shape[1] % tile == rest else 0)


def lost_heads_from(kind: str, head: int) -> FusedOp:
    """Heads from this one on are zeros."""
    return spoiling(kind, lambda out: out[:, head:].zero_())


def lost_channels(most: int) -> FusedOp:
    """Channels of a cached row from this one on are zeros: the kernel was made for narrower ones."""

    def spoil(given: dict[str, Any]) -> None:
        rows = written(given)
        if rows.shape[1] > most and rows.shape[1] != 576:
            rows[:, most:] = 0
            overwrite(given, rows)

    return after("write_latent", spoil)


def lost_outputs(kind: str, tile: int, rest: int) -> FusedOp:
    """Where a tile of outputs leaves this rest, the last output is forgotten."""
    return spoiling(kind, lambda out: out[..., -1].zero_() if out.shape[-1] % tile == rest else 0)


def lost_inputs(kind: str, tile: int) -> FusedOp:
    """Inputs behind the last whole tile are left out, if there is a tile."""

    def whole(x: Tensor) -> Tensor:
        cut = x.shape[-1] // tile * tile
        return torch.cat((x[..., :cut], torch.zeros_like(x[..., cut:])), -1) if cut else x

    return changing(kind, "x", whole)


def padded_mean(tile: int) -> FusedOp:
    """The mean of squares is taken over a width that is rounded up to whole tiles."""

    def spoil(given: dict[str, Any]) -> None:
        width = given["x"].shape[-1]
        given["out"].mul_((-(-width // tile) * tile / width) ** 0.5)

    return after("rms_norm", spoil)


# ----------------------------------------------------------------------------------------- index, order


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


# ------------------------------------------------------------------------------------------------ state


def late_writer(kind: str, later: int) -> FusedOp:
    """Writes what it computed to the caller's memory once more, and wrong, some calls later."""
    kept: list[dict[str, Any]] = []

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **given)
        kept.append(given)
        if len(kept) > later:
            overwrite(kept.pop(0), 7)

    return mutant(kind, body)


def remembers(kind: str, *names: str, shape: bool = False) -> FusedOp:
    """Takes tensors at an address, or of a shape, to be those that it saw there first."""
    kept: dict[Any, Tensor] = {}

    def body(right: Any, *state: Any, **given: Any) -> None:
        for name in names:
            if given.get(name) is not None:
                key = (name, given[name].shape if shape else given[name].data_ptr())
                given[name] = kept.setdefault(key, given[name].clone())
        right(*state, **given)

    return mutant(kind, body)


def remembers_result(kind: str) -> FusedOp:
    """Returns the result that it had for tensors at the same addresses."""
    kept: dict[Any, Tensor] = {}

    def body(right: Any, *state: Any, **given: Any) -> None:
        tensors = [one for one in given.values() if torch.is_tensor(one)]
        key = tuple((one.data_ptr(), one.shape) for one in tensors)
        if key in kept:
            overwrite(given, kept[key])
        else:
            right(*state, **given)
            kept[key] = written(given)

    return mutant(kind, body)


def skips_finite(kind: str) -> FusedOp:
    """Computes only what is still NaN."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        if not given["out"].isfinite().all() or not len(given["out"]):
            right(*state, **given)

    return mutant(kind, body)


def adds_previous(kind: str, share: float) -> FusedOp:
    """Adds a little of the last result of as many rows: scratch memory that is not cleared."""
    kept: dict[Any, Tensor] = {}

    def spoil(given: dict[str, Any]) -> None:
        rows = written(given)
        if rows.shape in kept:
            overwrite(given, rows + share * kept[rows.shape])
        kept[rows.shape] = rows

    return after(kind, spoil)


def packs_once(kind: str, key: str) -> Any:
    """Packs a weight once per shape or address, and finds it again by that."""
    base, kept = type(REFERENCE[kind]), {}

    class PacksOnce(base):  # type: ignore[misc, valid-type]
        def pack(self, weight: Tensor) -> Packed:
            known = tuple(weight.shape) if key == "shape" else weight.data_ptr()
            return kept.setdefault((known, weight.dtype), super().pack(weight.clone()))

    return PacksOnce()


def first_weight(kind: str, key: str) -> Any:
    """Copies a packed weight at its first call, and finds it again by shape or by the object's identity."""
    kept: dict[Any, Packed] = {}

    def body(right: Any, packed: Packed, **given: Any) -> None:
        known = tuple(packed.data.shape) if key == "shape" else id(packed)
        right(kept.setdefault(known, Packed(packed.data.clone(), packed.nbytes)), **given)

    return mutant(kind, body)


# ----------------------------------------------------------------------------------- memory, emptiness


def rounds_rows_up(kind: str, tile: int) -> FusedOp:
    """Zeros are written behind the last row, up to a whole tile."""

    def spoil(out: Tensor) -> None:
        end = out.storage_offset() + out.shape[0] * out.stride(0)
        room = (out.untyped_storage().nbytes() // out.element_size() - end) // max(1, out.stride(0))
        rows = min(-out.shape[0] % tile, room)
        if rows > 0:
            out.as_strided((rows, *out.shape[1:]), out.stride(), end).zero_()

    return spoiling(kind, spoil)


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


# ---------------------------------------------------------------------------------------------- numbers


def narrow_sums(kind: str, tile: int, dtype: torch.dtype) -> FusedOp:
    """The sum of a product is kept in a narrow dtype between tiles of inputs."""

    def body(right: Any, packed: Packed, *, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        sums = torch.zeros(out.shape, dtype=dtype)
        for first in range(0, x.shape[-1], tile):
            part = slice(first, first + tile)
            sums += _product(x[..., part], packed.data, part).to(dtype)
        out.copy_(sums if bias is None else sums.float() + bias)

    return mutant(kind, body)


def split_sums(kind: str, splits: int) -> FusedOp:
    """Each part of a split product is rounded to the dtype of the output."""

    def body(right: Any, packed: Packed, *, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        size = -(-x.shape[-1] // splits)
        parts = [slice(first, first + size) for first in range(0, x.shape[-1], size)]
        sums = sum(_product(x[..., part], packed.data, part).to(out.dtype).float() for part in parts)
        out.copy_(sums if bias is None else sums + bias)

    return mutant(kind, body)


def _product(x: Tensor, weight: Tensor, part: slice) -> Tensor:
    """Multiply columns of x by those of a weight as the reference packs it: [o, i], or [h, i, o]."""
    if x.dim() == 2:
        return x.float() @ weight[:, part].float().T
    return torch.einsum("thi,hio->tho", x.float(), weight[:, part].float())


def eight_bits(kind: str, by: str, name: str = "x") -> FusedOp:
    """Inputs are rounded to 8 bits, with one scale for all of them or one per row."""

    def rounded(x: Tensor) -> Tensor:
        if not x.numel():
            return x
        largest = (
            x.abs().amax() if by == "call" else x.abs().flatten(1).amax(1).view(-1, *(1,) * (x.dim() - 1))
        )
        step = largest.float().clamp_min(1e-30) / 127
        return ((x / step).round() * step).to(x.dtype)

    return changing(kind, name, rounded)


def flushes_small(kind: str, least: float) -> FusedOp:
    """Rows that are so much smaller than the largest one of the call become zeros."""

    def spoil(given: dict[str, Any]) -> None:
        sizes = given["kv_a" if "cache" in given else "x"].float().flatten(1).norm(dim=1)
        if len(sizes):
            rows = written(given)
            rows[sizes < least * sizes.amax()] = 0
            overwrite(given, rows)

    return after(kind, spoil)


def narrow_squares(tile: int) -> FusedOp:
    """The sum of squares is kept in bfloat16 between tiles of features."""

    def body(right: Any, *, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        total = torch.zeros(len(x), 1, dtype=torch.bfloat16)
        for part in x.float().square().split(tile, dim=1):
            total += part.sum(1, keepdim=True).bfloat16()
        mean = total.float() / x.shape[1]
        out.copy_(x.float() * torch.rsqrt(mean + eps) * weight)

    return mutant("rms_norm", body)
