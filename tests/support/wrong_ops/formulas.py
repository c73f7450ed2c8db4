"""Small ops whose formula is wrong: check -> ops that it must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mla.reference import REFERENCE
from mla_backends.api import Packed
from wrong_ops.base import SMALL_OPS, changing, mutant, spoiling

LINEAR, BATCHED, NORM, ROTATE, WRITE = SMALL_OPS
Linear, Batched = type(REFERENCE[LINEAR]), type(REFERENCE[BATCHED])


class Lossy(Linear):  # type: ignore[misc, valid-type]
    """Packs through half precision."""

    def pack(self, weight: torch.Tensor) -> Packed:
        return Packed(weight.half().to(weight.dtype), 1)


class LossyBatched(Batched):  # type: ignore[misc, valid-type]
    def pack(self, weight: torch.Tensor) -> Packed:
        return super().pack(weight.half().to(weight.dtype))


class InPlacePack(Linear):  # type: ignore[misc, valid-type]
    """Uses the weight it is given as its own."""

    def pack(self, weight: torch.Tensor) -> Packed:
        return super().pack(weight.mul_(2))

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data / 2


def last_tile(out: torch.Tensor) -> None:
    out[..., 64:] = 0


def scratch(right: Any, *state: Any, **given: Any) -> None:
    given["x"].mul_(2)
    right(*state, **given)
    given["out"].div_(2)


def narrow_norm(right: Any, **given: Any) -> None:
    right(**given)
    overflowed = given["x"].half().square().mean(-1).isinf()
    given["out"][overflowed] = 0


def in_two_steps(right: Any, *, x: Any, cos_sin: Any, interleaved: bool, out: Any) -> None:
    """Write the first channel of a pair before the second has been computed from it."""
    cos, sin = (part[:, None] for part in cos_sin.chunk(2, dim=-1))
    half = x.shape[-1] // 2
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    )
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos


def unrotated(cos_sin: torch.Tensor) -> torch.Tensor:
    still = torch.zeros_like(cos_sin)
    still[:, : still.shape[1] // 2] = 1
    return still


def fixed_page(right: Any, **given: Any) -> None:
    size = given["cache"].shape[1]
    slots = given["slots"] // 64 * size + given["slots"] % 64 % size
    right(**{**given, "slots": slots % given["cache"][..., 0].numel()})


def next_slot_too(right: Any, **given: Any) -> None:
    flat = given["cache"].view(-1, given["cache"].shape[-1])
    free = next(slot for slot in range(len(flat)) if slot not in given["slots"].tolist())
    right(**given)
    flat[free, -1] = 7


def norm_in_place(right: Any, **given: Any) -> None:
    right(**given)
    width = given["weight"].shape[0]
    given["kv_a"][:, :width] *= 2


def made_for_512(right: Any, **given: Any) -> None:
    right(**given)
    if given["weight"].shape[0] != 512:
        given["cache"].view(-1, given["cache"].shape[-1])[given["slots"], 0] = 0


def narrow_write(right: Any, **given: Any) -> None:
    latent = given["kv_a"][:, : given["weight"].shape[0]]
    scale = torch.where(latent.half().square().mean(-1, keepdim=True).isinf(), 0, 1)
    right(**{**given, "kv_a": given["kv_a"] * scale})


def with_eps(right: Any, **given: Any) -> None:
    right(**{**given, "eps": 1e-6})


def always(interleaved: bool) -> Callable[..., None]:
    return lambda right, **given: right(**{**given, "interleaved": interleaved})


MUTANTS: Mapping[str, list[Any]] = {
    "linear.product": [spoiling(LINEAR, last_tile), changing(LINEAR, "x", lambda x: x.flip(0))],
    "linear.pack": [Lossy(), InPlacePack()],
    "linear.inputs": [mutant(LINEAR, scratch)],
    "linear.bias": [changing(LINEAR, "bias", lambda bias: None)],  # type: ignore[arg-type, return-value]
    "batched_linear.product": [changing(BATCHED, "x", lambda x: x.roll(1, 1)), spoiling(BATCHED, last_tile)],
    "batched_linear.pack": [LossyBatched()],
    "batched_linear.inputs": [mutant(BATCHED, scratch)],
    "rms_norm.formula": [changing(NORM, "weight", torch.ones_like)],
    "rms_norm.eps": [mutant(NORM, with_eps)],
    "rms_norm.large": [mutant(NORM, narrow_norm)],
    "rotate_query.interleaved": [mutant(ROTATE, always(False))],
    "rotate_query.halves": [mutant(ROTATE, always(True))],
    "rotate_query.in_place": [mutant(ROTATE, in_two_steps)],
    "write_latent.formula": [
        changing(WRITE, "cos_sin", unrotated),
        changing(WRITE, "weight", torch.ones_like),
    ],
    "write_latent.halves": [mutant(WRITE, always(True))],
    "write_latent.eps": [mutant(WRITE, with_eps)],
    "write_latent.large": [mutant(WRITE, narrow_write)],
    "write_latent.page_sizes": [mutant(WRITE, fixed_page)],
    "write_latent.untouched": [mutant(WRITE, next_slot_too)],
    "write_latent.inputs": [mutant(WRITE, norm_in_place)],
    "write_latent.other_widths": [mutant(WRITE, made_for_512)],
}
