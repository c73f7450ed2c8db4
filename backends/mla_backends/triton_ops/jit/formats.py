"""Tokens of the cache as formats store them, read and written: `mla.cache.formats` defines their bytes.

A kernel is compiled for a FORMAT, "plain" or the name of one. A token begins at `row`, which points to bytes,
or to numbers of a plain cache. Its columns are those of the latent, and then those of the rotary key.

e4m3 is converted by the card where it can (NATIVE), and by integers elsewhere: both give the same codes.
"""

import triton
import triton.language as tl

TILE, BLOCK, BLOCK_BYTES = tl.constexpr(128), tl.constexpr(32), tl.constexpr(34)
E4M3_MAX, INT8_MAX = tl.constexpr(448.0), tl.constexpr(127.0)
LEAST_RATIO = tl.constexpr(1e-4)
LEAST_SCALE, FP32_MAX = tl.constexpr(2.0**-126), tl.constexpr(3.4028234663852886e38)  # of float32
BF16_MAX, FP16_MAX = tl.constexpr(3.3895313892515355e38), tl.constexpr(65504.0)
TO_WHOLE = tl.constexpr(1.5 * 2.0**23)  # a float32 beside it is rounded to whole numbers, halves to even
OF_FLOAT, OF_HALF = tl.constexpr(tl.pointer_type(tl.float32)), tl.constexpr(tl.pointer_type(tl.float16))


# ------------------------------------------------------------------------------------------- e4m3
@triton.jit
def e4m3_numbers(codes, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Return the numbers of e4m3 `codes`, uint8, in `dtype`; both codes of NaN are NaN."""
    if NATIVE:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(dtype)
    else:
        wide = codes.to(tl.uint16)
        halves = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)  # of 2^-8 the number, as float16
        numbers = halves.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        numbers = tl.where((codes & 0x7F) == 0x7F, float("nan"), numbers).to(dtype)
    return numbers


@triton.jit
def e4m3_codes(numbers, NATIVE: tl.constexpr):
    """Return the e4m3 codes, uint8, next to float32 `numbers`: halves to even, 448 beyond it, NaN for NaN."""
    if NATIVE:
        codes = numbers.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = numbers.to(tl.int32, bitcast=True)
        size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, normal)  # 2^-6, from where on codes have an exponent
        code = tl.where(numbers != numbers, 0x7F, code)
        codes = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


# ------------------------------------------------------------------------------------------- reading
@triton.jit
def cached(
    row,  # [KEYS]
    there,  # [KEYS]: which are read; others give zeros
    dtype: tl.constexpr,  # of numbers that need no more, see `exact`
    FIRST: tl.constexpr,  # column, at which the latent, a power of two of it, or the key begins
    N: tl.constexpr,  # columns, a power of two; those behind the latent or the key give zeros
    LATENT: tl.constexpr,  # c
    ROPE: tl.constexpr,  # r
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Return columns of tokens [KEYS, N]: numbers of `dtype` where that is exact, of float32 elsewhere.

    Those of "fp8" and "int8" are codes: whoever multiplies them takes their scale from elsewhere.
    """
    END: tl.constexpr = LATENT if FIRST < LATENT else LATENT + ROPE
    column = FIRST + tl.arange(0, N)
    inside = there[:, None] & (column < END)[None, :]
    place = row[:, None]
    if FORMAT == "plain":
        numbers = tl.load(place + column[None, :], mask=inside, other=0.0).to(dtype)
    elif FORMAT == "fp8":
        numbers = e4m3_numbers(tl.load(place + column[None, :], mask=inside, other=0), dtype, NATIVE)
    elif FORMAT == "int8":
        codes = tl.load(place + column[None, :], mask=inside, other=0).to(tl.int8, bitcast=True)
        numbers = codes.to(dtype)
    elif FORMAT == "q8_0":
        WIDTH: tl.constexpr = N if N < BLOCK else BLOCK
        group = FIRST + tl.arange(0, N // WIDTH) * WIDTH
        at = place + (group // BLOCK * BLOCK_BYTES + group % BLOCK + 2)[None, :]
        whole = there[:, None] & (group < END)[None, :]  # blocks lie side by side, and so do their codes
        codes = tl.load(at[:, :, None] + tl.arange(0, WIDTH)[None, None, :], mask=whole[:, :, None], other=0)
        wide = codes.to(tl.int8, bitcast=True).to(tl.float32)
        numbers = scaled(wide, place, there, FIRST, N, END, BLOCK, 0, BLOCK_BYTES, OF_HALF)
    elif FIRST < LATENT:
        codes = tl.load(place + column[None, :], mask=inside, other=0)
        wide = e4m3_numbers(codes, tl.float32, NATIVE)
        numbers = scaled(wide, place, there, FIRST, N, END, TILE, LATENT, 4, OF_FLOAT)
        if FORMAT == "fp8_ds_mla":  # of four bits, times a power of two
            numbers = numbers.to(dtype)
    else:
        keys = (row + (LATENT + 4 * ((LATENT + TILE - 1) // TILE))).to(tl.pointer_type(tl.bfloat16))
        at = tl.arange(0, N)
        numbers = tl.load(keys[:, None] + at[None, :], mask=inside, other=0.0).to(dtype)
    return numbers


@triton.jit
def int8_scales(row, there, PART: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr):
    """Return the scales [KEYS] of the latents (PART 0) or keys (1) of tokens of "int8"; 0 of others."""
    at = (row + (LATENT + ROPE + 4 * PART)).to(tl.pointer_type(tl.float32))
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def scaled(
    codes,  # [KEYS, N] fp32, or the same in groups that share a scale
    place,  # [KEYS, 1]
    there,  # [KEYS]
    FIRST: tl.constexpr,
    N: tl.constexpr,
    END: tl.constexpr,
    SHARING: tl.constexpr,  # columns that have a scale together
    AT: tl.constexpr,  # the byte of the first scale, and from one to the next
    STEP: tl.constexpr,
    OF: tl.constexpr,  # the type of pointers to scales
):
    """Return codes times the scales of their columns, float32."""
    WIDTH: tl.constexpr = N if N < SHARING else SHARING
    group = FIRST + tl.arange(0, N // WIDTH) * WIDTH  # its first column
    scales = tl.load(
        (place + (AT + group // SHARING * STEP)[None, :]).to(OF),
        mask=there[:, None] & (group < END)[None, :],
        other=0.0,
    ).to(tl.float32)
    parts = tl.reshape(codes, [codes.shape[0], N // WIDTH, WIDTH]) * scales[:, :, None]
    return tl.reshape(parts, [codes.shape[0], N])


# ------------------------------------------------------------------------------------------- writing
@triton.jit
def put(
    row,  # of one token
    numbers,  # [N] fp32, of which COUNT are stored
    scale,  # of "fp8", fp32
    FIRST: tl.constexpr,  # column: 0 for the latent, LATENT for the key
    COUNT: tl.constexpr,
    N: tl.constexpr,  # a power of two
    LATENT: tl.constexpr,  # c
    ROPE: tl.constexpr,  # r
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Store the latent or the key of a token, encoded as it is: nothing rounds it before."""
    at = tl.arange(0, N)
    if FORMAT == "plain":
        tl.store(row + FIRST + at, numbers.to(row.dtype.element_ty), mask=at < COUNT)
    elif FORMAT == "fp8":
        codes = e4m3_codes(tl.div_rn(numbers, scale + tl.zeros_like(numbers)), NATIVE)
        tl.store(row + FIRST + at, codes, mask=at < COUNT)
    elif FORMAT == "int8":
        put_int8(row, numbers, FIRST, COUNT, N, LATENT + ROPE + 4 * (FIRST // LATENT))
        if ROPE == 0:  # whose key has a scale all the same
            tl.store((row + LATENT + 4).to(tl.pointer_type(tl.float32)), LEAST_SCALE)
    elif FORMAT == "q8_0":
        put_blocks(row, numbers, FIRST, COUNT, N)
    elif FIRST < LATENT:
        put_tiles(row, numbers, COUNT, N, FORMAT, NATIVE)
    else:
        begins = row + (LATENT + 4 * ((LATENT + TILE - 1) // TILE))
        key = tl.where(numbers != numbers, numbers, tl.clamp(numbers, -BF16_MAX, BF16_MAX))
        tl.store(begins.to(tl.pointer_type(tl.bfloat16)) + at, key.to(tl.bfloat16), mask=at < COUNT)


@triton.jit
def put_tiles(row, numbers, COUNT: tl.constexpr, N: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Store the latent as e4m3, and behind it a scale for every TILE of it."""
    WIDTH: tl.constexpr = N if N < TILE else TILE
    tile = tl.arange(0, N // WIDTH)
    parts = tl.reshape(numbers, [N // WIDTH, WIDTH])
    ratio = over(largest(parts), E4M3_MAX)
    if FORMAT == "fp8_ds_mla":
        bits = tl.maximum(ratio, LEAST_RATIO).to(tl.int32, bitcast=True)
        scales = ((bits + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)  # the power of two above
    else:
        scales = tl.maximum(ratio, LEAST_SCALE)
    codes = e4m3_codes(tl.div_rn(parts, tl.broadcast_to(scales[:, None], [N // WIDTH, WIDTH])), NATIVE)
    at = tile[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(row + at, codes, mask=at < COUNT)
    tl.store((row + COUNT).to(tl.pointer_type(tl.float32)) + tile, scales, mask=tile * WIDTH < COUNT)


@triton.jit
def put_int8(
    row, numbers, FIRST: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """Store a part of a token as int8, and its scale at the byte SCALE."""
    at = tl.arange(0, N)
    scale = tl.maximum(over(largest(tl.reshape(numbers, [1, N])), INT8_MAX), LEAST_SCALE)
    ratio = tl.div_rn(numbers, tl.broadcast_to(scale, [N]))
    whole = (tl.clamp(tl.where(ratio != ratio, 0.0, ratio), -INT8_MAX, INT8_MAX) + TO_WHOLE) - TO_WHOLE
    tl.store(row + FIRST + at, whole.to(tl.int8).to(tl.uint8, bitcast=True), mask=at < COUNT)
    tl.store((row + SCALE).to(tl.pointer_type(tl.float32)) + tl.arange(0, 1), scale)


@triton.jit
def put_blocks(row, numbers, FIRST: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr):
    """Store a part of a token as blocks of a float16 scale and int8, halves rounded away from 0."""
    block = tl.arange(0, N // BLOCK)
    parts = tl.reshape(numbers, [N // BLOCK, BLOCK])
    scales = over(largest(parts), INT8_MAX)
    inverse = tl.where(scales > 0, tl.div_rn(tl.full([N // BLOCK], 1.0, tl.float32), scales), 0.0)
    ratio = parts * inverse[:, None]
    size = tl.minimum(tl.where(ratio != ratio, 0.0, tl.abs(ratio)), INT8_MAX)
    whole = (tl.floor(2.0 * size).to(tl.int32) + 1) >> 1
    codes = tl.where(ratio < 0, -whole, whole).to(tl.int8).to(tl.uint8, bitcast=True)
    begins = row + (FIRST // BLOCK + block) * BLOCK_BYTES
    at = tl.arange(0, BLOCK)[None, :]
    tl.store(begins[:, None] + 2 + at, codes, mask=(block * BLOCK)[:, None] + at < COUNT)
    kept = tl.minimum(scales, FP16_MAX).to(tl.float16)
    tl.store(begins.to(tl.pointer_type(tl.float16)), kept, mask=block * BLOCK < COUNT)


@triton.jit
def largest(parts):  # [groups, n] fp32
    """Return the largest size of a number of each group, NaN left out, at most what float32 holds."""
    sizes = tl.where(parts != parts, 0.0, tl.minimum(tl.abs(parts), FP32_MAX))
    return tl.max(sizes, 1)


@triton.jit
def over(numbers, divisor: tl.constexpr):
    """Return float32 numbers over a constant, rounded once."""
    return tl.div_rn(numbers, tl.zeros_like(numbers) + divisor)
