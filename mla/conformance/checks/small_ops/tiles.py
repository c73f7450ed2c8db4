"""Small ops: widths and heads that no tile divides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mla.conformance.checks.small_ops.kinds import PRODUCTS, both_ways, by_turns, small_check, vary
from mla.conformance.problems.attention import DEEPSEEK
from mla.conformance.problems.small_call import check_small
from mla.conformance.problems.small_ops import LatentWrite, MatMul, Norm, Rotation, SmallProblem
from mla.conformance.trial import Trial

# Beside the tiles of 16 to 256 that kernels cut widths into, and what they serve without a remainder.
BESIDE = (16, 32, 64, 128, 256)
WIDTHS = (1, 2, 8, *(width + step for width in BESIDE for step in (-1, 0, 1)))
EVEN = (48, 80, 96, 112, 160, 192, 224, 320, 384, 512)  # for kernels that want multiples of 16
LATENTS = ((512, 32), (512, 96), (512, 128), (256, 64), (528, 64), (127, 62), (65, 2), (1, 66))
ROTARY = (2, 32, 62, 96, 128)
# Every rest of a tile of up to 32 heads, and what layers have.
HEADS = (*range(1, 34), 40, 48, 63, 64, 65, 96, 127, 128)


@small_check(
    "widths",
    catches="a last tile of inputs or outputs that is missing, or filled with what lies behind",
    fails="tiles",
    kinds=PRODUCTS,
)
def product_widths(trial: Trial, example: SmallProblem) -> None:
    """Inputs and outputs may have widths that no tile divides, or refuse them with a reason."""
    for tokens in (3,) if trial.quick else (1, 3, 17, 64):
        some = vary(example, tokens=tokens)
        of = (vary(some, **{side: width}) for width in (*WIDTHS, *EVEN) for side in ("inputs", "outputs"))
        check_small(trial, *by_turns(*dict.fromkeys(of)))


@small_check(
    "widths", catches="squares that are summed over a padded width", fails="tiles", kinds=("rms_norm",)
)
def norm_widths(trial: Trial, example: SmallProblem) -> None:
    """Rows may have a width that no tile divides, or it is refused with a reason."""
    wide = (511, 512, 513, 768, 1023, 1024, 1025, 1536, 2047, 2048, 2049, 4096, 7168)
    widths = sorted({*WIDTHS, *EVEN, *wide})
    for tokens in (3,) if trial.quick else (1, 3, 17):
        check_small(trial, *(Norm(tokens=tokens, features=width) for width in widths))


@small_check(
    "widths",
    catches="a last tile of a latent or of a key that is missing",
    fails="tiles",
    kinds=("write_latent",),
)
def latent_widths(trial: Trial, example: SmallProblem) -> None:
    """Latents and keys may have other widths than 512 and 64, or they are refused with a reason."""
    for latent, rotary in LATENTS:
        dims = replace(DEEPSEEK, kv_lora_rank=latent, qk_rope_head_dim=rotary)
        check_small(trial, *both_ways(LatentWrite(dims=dims)))


@small_check(
    "widths",
    catches="heads that are taken to have 64 channels, or a last tile of channels that is missing",
    fails="tiles",
    kinds=("rotate_query",),
)
def rotary_widths(trial: Trial, example: SmallProblem) -> None:
    """Heads may have other widths than 64, or they are refused with a reason."""
    for tokens in (3,) if trial.quick else (1, 3, 17, 130):
        check_small(trial, *both_ways(*(vary(example, tokens=tokens, width=width) for width in ROTARY)))


@small_check(
    "heads",
    catches="heads that are left over by a tile of heads, or a head count that is assumed",
    fails="tiles",
    kinds=("batched_linear", "rotate_query"),
)
def heads(trial: Trial, example: SmallProblem) -> None:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    for tokens in (1, 3) if trial.quick else (1, 2, 3, 5, 17, 64):
        check_small(trial, *by_turns(*_of_heads(vary(example, tokens=tokens), trial.quick)))


def _of_heads(problem: SmallProblem, quick: bool) -> Iterator[SmallProblem]:
    """Yield the problem with other numbers of heads."""
    width = 64 if quick else 128
    for count in HEADS:
        if isinstance(problem, MatMul):
            yield replace(problem, inputs=width, outputs=width, groups=count)
        elif isinstance(problem, Rotation):
            yield replace(problem, heads=count)
