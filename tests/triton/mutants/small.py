"""Mistakes in the kernels of the small ops."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_pointwise = partial(Mutant, room="pointwise")

SMALL = (
    _pointwise(
        "eps is lost",
        old="factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)",
        new="factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH)",
    ),
    _pointwise(
        "the mean is over the padded row",
        old="tl.sum(wide * wide, 0) / WIDTH",
        new="tl.sum(wide * wide, 0) / WIDE",
    ),
    _pointwise(
        "rows are taken for contiguous", old="x + row * x_row + column", new="x + row * WIDTH + column"
    ),
    _pointwise(
        "pairs turn the other way", old="(a * cos - b * sin).to(out", new="(a * cos + b * sin).to(out"
    ),
    _pointwise(
        "heads behind the last are rotated",
        old="there = (head < HEADS)[:, None] & has_pair[None, :]",
        new="there = (head >= 0)[:, None] & has_pair[None, :]",
    ),
    _pointwise(
        "slots are taken for tokens",
        old="tl.load(slots + token) * TOKEN",
        new="token * TOKEN",
    ),
    _pointwise(
        "a latent is written over its whole padded width",
        old="put(row, latent, stored_scale, 0, LATENT,",
        new="put(row, latent, stored_scale, 0, WIDE_LATENT,",
    ),
    _pointwise("the shared key is not turned", old="if PAIRS > 0:", new="if PAIRS < 0:"),
    _pointwise(
        "the shared key turns the other way",
        old="tl.where(left, -others, others)",
        new="tl.where(left, others, -others)",
    ),
    _pointwise(
        "the shared key is turned by the angles of the first token",
        old="source + LATENT, angles,",
        new="source + LATENT, cos_sin,",
    ),
    _pointwise(
        "the first heads are left out where the latent is written",
        old="tl.program_id(1) - 1,",
        new="tl.program_id(1),",
    ),
    _pointwise(
        "queries are those of the first token where the latent is written",
        old="x + token * x_token, angles,",
        new="x, angles,",
    ),
    _pointwise(
        "rotated queries are taken for contiguous where the latent is written",
        old="angles, out + token * out_token, tl.program_id(1) - 1,",
        new="angles, out + token * HEADS * 2 * PAIRS, tl.program_id(1) - 1,",
    ),
    _pointwise(
        "a norm is rounded before its weight",
        old="(wide * factor * by).to(out",
        new="((wide * factor).to(out.dtype.element_ty).to(tl.float32) * by).to(out",
    ),
    _pointwise(
        "slots are held in 32 bits",
        old="tl.load(slots + token) * T",
        new="tl.load(slots + token).to(tl.int32) * T",
    ),
)
