"""RMSNorm, rotation, and the cache write that joins them. Sums and rotations in fp32, rounded once."""

import triton
import triton.language as tl

from mla_backends.triton_ops.jit.formats import put
from mla_backends.triton_ops.jit.shared import follow


@triton.jit
def rms_norm(
    x,  # [T, d]
    weight,  # [d]
    out,  # [T, d]
    eps,
    x_row,  # strides, in elements
    out_row,
    WIDTH: tl.constexpr,  # d
    WIDE: tl.constexpr,  # the next power of two
    EARLY: tl.constexpr,  # see `follow`
):
    """Write x / sqrt(mean(x^2) + eps) * weight of one row. Grid: (T,)."""
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    there = column < WIDTH
    wide = tl.load(x + row * x_row + column, mask=there, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    by = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, (wide * factor * by).to(out.dtype.element_ty), mask=there)


@triton.jit
def rotate_query(
    x,  # [T, h, r]
    cos_sin,  # [T, r] fp32
    out,  # [T, h, r], may be x
    x_token,  # strides, in elements
    x_head,
    cos_sin_row,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,  # heads of a program
    PAIRS: tl.constexpr,  # r / 2
    WIDE_PAIRS: tl.constexpr,  # the next power of two
    INTERLEAVED: tl.constexpr,
    EARLY: tl.constexpr,  # see `follow`
):
    """Rotate some heads of one token. Grid: (T, ceil(h / BLOCK))."""
    follow(EARLY)
    token = tl.program_id(0).to(tl.int64)
    rotate_heads(
        x + token * x_token, cos_sin + token * cos_sin_row, out + token * out_token, tl.program_id(1),
        x_head, out_head, HEADS, BLOCK, PAIRS, WIDE_PAIRS, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def rotate_heads(
    x,  # [h, r], of a token
    angles,  # [r] fp32
    out,  # [h, r], may be x
    block,  # which BLOCK heads
    x_head,  # strides, in elements
    out_head,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,  # r / 2
    WIDE_PAIRS: tl.constexpr,  # the next power of two
    INTERLEAVED: tl.constexpr,
):
    """Rotate some heads of a token."""
    head = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    pair = tl.arange(0, WIDE_PAIRS)
    has_pair = pair < PAIRS
    there = (head < HEADS)[:, None] & has_pair[None, :]
    if INTERLEAVED:
        left = 2 * pair
        right = left + 1
    else:
        left = pair
        right = pair + PAIRS
    cos = tl.load(angles + pair, mask=has_pair, other=0.0)[None, :]
    sin = tl.load(angles + PAIRS + pair, mask=has_pair, other=0.0)[None, :]
    x_row = x + head[:, None] * x_head
    a = tl.load(x_row + left[None, :], mask=there, other=0.0).to(tl.float32)
    b = tl.load(x_row + right[None, :], mask=there, other=0.0).to(tl.float32)
    out_row = out + head[:, None] * out_head
    tl.store(out_row + left[None, :], (a * cos - b * sin).to(out.dtype.element_ty), mask=there)
    tl.store(out_row + right[None, :], (b * cos + a * sin).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["slots"])  # whose alignment changes with the number of tokens
def write_latent(
    kv_a,  # [T, c + r]
    weight,  # [c]
    cos_sin,  # [T, r] fp32
    slots,  # [T] int64
    cache,  # [pages, page, TOKEN], contiguous
    x,  # [T, h, r], or anything without HEADS
    out,  # [T, h, r], may be x
    eps,
    stored_scale,  # of "fp8", fp32
    kv_a_row,  # strides, in elements
    cos_sin_row,
    x_token,
    x_head,
    out_token,
    out_head,
    LATENT: tl.constexpr,  # c
    WIDE_LATENT: tl.constexpr,  # the next power of two
    PAIRS: tl.constexpr,  # r / 2
    WIDE_PAIRS: tl.constexpr,  # the next power of two, or 0
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,  # of x, which is rotated as well, or 0
    BLOCK: tl.constexpr,  # heads of a program
    TOKEN: tl.constexpr,  # elements of a cached token
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,  # see formats.py
    EARLY: tl.constexpr,  # see `follow`
):
    """Norm the latent of one token, rotate its shared key, and write both to its slot; or rotate some heads.

    Grid: (T, 1 + ceil(h / BLOCK)), of which the first of a token is for its latent.
    """
    follow(EARLY)
    token = tl.program_id(0).to(tl.int64)
    angles = cos_sin + token * cos_sin_row
    if tl.program_id(1) == 0:
        source = kv_a + token * kv_a_row
        row = cache + tl.load(slots + token) * TOKEN
        column = tl.arange(0, WIDE_LATENT)
        there = column < LATENT
        wide = tl.load(source + column, mask=there, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / LATENT + eps)
        latent = wide * factor * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
        put(row, latent, stored_scale, 0, LATENT, WIDE_LATENT, LATENT, 2 * PAIRS, FORMAT, NATIVE)
        if PAIRS > 0:
            key = rotated(source + LATENT, angles, PAIRS, 2 * WIDE_PAIRS, INTERLEAVED)
            put(row, key, stored_scale, LATENT, 2 * PAIRS, 2 * WIDE_PAIRS, LATENT, 2 * PAIRS, FORMAT, NATIVE)
    elif HEADS > 0:
        rotate_heads(
            x + token * x_token, angles, out + token * out_token, tl.program_id(1) - 1,
            x_head, out_head, HEADS, BLOCK, PAIRS, WIDE_PAIRS, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def rotated(
    x,  # [r]
    angles,  # [r] fp32
    PAIRS: tl.constexpr,  # r / 2
    WIDE: tl.constexpr,  # a power of two
    INTERLEAVED: tl.constexpr,
):
    """Return the rotated x [WIDE], fp32, zeros behind it."""
    channel = tl.arange(0, WIDE)
    there = channel < 2 * PAIRS
    if INTERLEAVED:
        pair = channel // 2
        other = channel ^ 1
        left = channel % 2 == 0
    else:
        pair = channel % PAIRS
        other = (channel + PAIRS) % (2 * PAIRS)
        left = channel < PAIRS
    cos = tl.load(angles + pair, mask=there, other=0.0)
    sin = tl.load(angles + PAIRS + pair, mask=there, other=0.0)
    mine = tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    others = tl.load(x + other, mask=there, other=0.0).to(tl.float32)
    return mine * cos + tl.where(left, -others, others) * sin
