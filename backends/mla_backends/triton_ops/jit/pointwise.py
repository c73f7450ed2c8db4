"""RMSNorm, rotation, and the cache write that joins them. Sums and rotations in fp32, rounded once."""

import triton
import triton.language as tl


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
):
    """Write x / sqrt(mean(x^2) + eps) * weight of one row. Grid: (T,)."""
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
):
    """Rotate some heads of one token. Grid: (T, ceil(h / BLOCK))."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    pair = tl.arange(0, WIDE_PAIRS)
    has_pair = pair < PAIRS
    there = (head < HEADS)[:, None] & has_pair[None, :]
    if INTERLEAVED:
        left = 2 * pair
        right = left + 1
    else:
        left = pair
        right = pair + PAIRS
    angles = cos_sin + token * cos_sin_row
    cos = tl.load(angles + pair, mask=has_pair, other=0.0)[None, :]
    sin = tl.load(angles + PAIRS + pair, mask=has_pair, other=0.0)[None, :]
    x_row = x + token * x_token + head[:, None] * x_head
    a = tl.load(x_row + left[None, :], mask=there, other=0.0).to(tl.float32)
    b = tl.load(x_row + right[None, :], mask=there, other=0.0).to(tl.float32)
    out_row = out + token * out_token + head[:, None] * out_head
    tl.store(out_row + left[None, :], (a * cos - b * sin).to(out.dtype.element_ty), mask=there)
    tl.store(out_row + right[None, :], (b * cos + a * sin).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["slots"])  # whose alignment changes with the number of tokens
def write_latent(
    kv_a,  # [T, c + r]
    weight,  # [c]
    cos_sin,  # [T, r] fp32
    slots,  # [T] int64
    cache,  # [pages, page, c + r], contiguous
    eps,
    kv_a_row,  # strides, in elements
    cos_sin_row,
    LATENT: tl.constexpr,  # c
    WIDE_LATENT: tl.constexpr,  # the next power of two
    PAIRS: tl.constexpr,  # r / 2
    WIDE_PAIRS: tl.constexpr,  # the next power of two, or 0
    INTERLEAVED: tl.constexpr,
):
    """Norm the latent of one token, rotate its shared key, and write both to its slot. Grid: (T,)."""
    token = tl.program_id(0).to(tl.int64)
    source = kv_a + token * kv_a_row
    target = cache + tl.load(slots + token) * (LATENT + 2 * PAIRS)
    column = tl.arange(0, WIDE_LATENT)
    there = column < LATENT
    wide = tl.load(source + column, mask=there, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / LATENT + eps)
    by = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(target + column, (wide * factor * by).to(cache.dtype.element_ty), mask=there)
    if PAIRS > 0:
        pair = tl.arange(0, WIDE_PAIRS)
        has_pair = pair < PAIRS
        if INTERLEAVED:
            left = LATENT + 2 * pair
            right = left + 1
        else:
            left = LATENT + pair
            right = left + PAIRS
        cos = tl.load(cos_sin + token * cos_sin_row + pair, mask=has_pair, other=0.0)
        sin = tl.load(cos_sin + token * cos_sin_row + PAIRS + pair, mask=has_pair, other=0.0)
        a = tl.load(source + left, mask=has_pair, other=0.0).to(tl.float32)
        b = tl.load(source + right, mask=has_pair, other=0.0).to(tl.float32)
        tl.store(target + left, (a * cos - b * sin).to(cache.dtype.element_ty), mask=has_pair)
        tl.store(target + right, (b * cos + a * sin).to(cache.dtype.element_ty), mask=has_pair)
