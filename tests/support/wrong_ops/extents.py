"""Small ops that are wrong about sizes: rows and blocks of a grid, tiles of heads, inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch

from mla_backends.api import FusedOp
from wrong_ops.base import Tensor, after, changing, overwrite, rows_of, spoiling, written

# ---------------------------------------------------------------------------------------------------- grid


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


# --------------------------------------------------------------------------------------------------- tiles


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
