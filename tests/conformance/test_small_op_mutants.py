"""Deliberately wrong projections, norms, rotations and cache writes: each must fail its own check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult
from mla.reference import REFERENCE
from mla_backends.api import Packed

Run = Callable[..., list[CheckResult]]
Linear, Batched = type(REFERENCE["linear"]), type(REFERENCE["batched_linear"])
Norm, Rotate, Write = (type(REFERENCE[kind]) for kind in ("rms_norm", "rotate_query", "write_latent"))
GROUPS = ("linear", "batched_linear", "rms_norm", "rotate_query", "write_latent")


def as_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Read memory as a kernel does that takes its input to be contiguous."""
    strides = torch.empty(x.shape).stride()
    return x.as_strided(x.shape, strides, x.storage_offset())


def mutant(base: type, body: Callable[..., None]) -> Any:
    """Return an op whose call is `body(right, *state, **tensors)`; `right` is the right call."""

    def call(self: Any, *state: Any, **tensors: Any) -> None:
        body(super(changed, self).__call__, *state, **tensors)

    changed = type("Mutant", (base,), {"__call__": call})
    return changed()


def changing(base: type, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return an op that is given another tensor than it should be."""
    return mutant(base, lambda right, *state, **given: right(*state, **{**given, name: change(given[name])}))


def spoiling(base: type, spoil: Callable[[torch.Tensor], object], name: str = "out") -> Any:
    """Return an op that is right and then changes one of its tensors."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **given)
        spoil(given[name])

    return mutant(base, body)


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


def many_heads(out: torch.Tensor) -> None:
    out[:, 64:] = 0


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


def one_block(cos_sin: torch.Tensor) -> torch.Tensor:
    """Return the angles of the block's first token for all tokens of a block of 64."""
    return cos_sin[torch.arange(len(cos_sin)) // 64 * 64] if len(cos_sin) > 64 else cos_sin


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
    "linear.product": [spoiling(Linear, last_tile), changing(Linear, "x", lambda x: x.flip(0))],
    "linear.strided": [changing(Linear, "x", as_contiguous)],
    "linear.pack": [Lossy(), InPlacePack()],
    "linear.inputs": [mutant(Linear, scratch)],
    "linear.bias": [changing(Linear, "bias", lambda bias: None)],  # type: ignore[arg-type, return-value]
    "batched_linear.product": [changing(Batched, "x", lambda x: x.roll(1, 1)), spoiling(Batched, last_tile)],
    "batched_linear.strided": [changing(Batched, "x", as_contiguous)],
    "batched_linear.pack": [LossyBatched()],
    "batched_linear.inputs": [mutant(Batched, scratch)],
    "batched_linear.heads": [spoiling(Batched, many_heads)],
    "rms_norm.formula": [changing(Norm, "weight", torch.ones_like)],
    "rms_norm.eps": [mutant(Norm, with_eps)],
    "rms_norm.large": [mutant(Norm, narrow_norm)],
    "rms_norm.strided": [changing(Norm, "x", as_contiguous)],
    "rotate_query.interleaved": [mutant(Rotate, always(False))],
    "rotate_query.halves": [mutant(Rotate, always(True))],
    "rotate_query.heads": [changing(Rotate, "cos_sin", one_block)],
    "rotate_query.strided": [changing(Rotate, "x", as_contiguous)],
    "rotate_query.in_place": [mutant(Rotate, in_two_steps)],
    "write_latent.formula": [
        changing(Write, "cos_sin", unrotated),
        changing(Write, "weight", torch.ones_like),
    ],
    "write_latent.halves": [mutant(Write, always(True))],
    "write_latent.eps": [mutant(Write, with_eps)],
    "write_latent.large": [mutant(Write, narrow_write)],
    "write_latent.page_sizes": [mutant(Write, fixed_page)],
    "write_latent.strided": [changing(Write, "kv_a", as_contiguous)],
    "write_latent.untouched": [mutant(Write, next_slot_too)],
    "write_latent.inputs": [mutant(Write, norm_in_place)],
    "write_latent.other_widths": [mutant(Write, made_for_512)],
}
# Mutants so specific that no other check of their group may notice them.
ALONE = (
    "linear.bias",
    "linear.strided",
    "batched_linear.heads",
    "rms_norm.eps",
    "rms_norm.large",
    "rotate_query.heads",
    "rotate_query.in_place",
    "write_latent.eps",
    "write_latent.halves",
    "write_latent.inputs",
    "write_latent.large",
    "write_latent.untouched",
)
CASES = [(name, number) for name, mutants in MUTANTS.items() for number in range(len(mutants))]


def failed(results: list[CheckResult]) -> set[str]:
    """Return what failed by its numbers; a mutant that raises proves nothing."""
    assert not [one.reason for one in results if "raised" in one.reason]
    return {one.check for one in results if one.of == "mine" and one.status == "fail"}


def test_every_check_of_a_small_op_has_a_mutant() -> None:
    assert set(MUTANTS) == {one.id for one in all_checks() if one.id.partition(".")[0] in GROUPS}


@pytest.mark.parametrize(("check", "number"), CASES)
def test_the_check_fails_a_wrong_op(judge: Run, sound: Any, check: str, number: int) -> None:
    backend = sound(ops={"mine": MUTANTS[check][number]})
    assert failed(judge(backend, f"{check}[mine-*]")) == {check}


@pytest.mark.parametrize("check", ALONE)
def test_no_other_check_fails_for_what_is_its_alone(judge: Run, sound: Any, check: str) -> None:
    backend = sound(ops={"mine": MUTANTS[check][0]})
    assert failed(judge(backend, f"{check.partition('.')[0]}.*[mine-*]")) == {check}
