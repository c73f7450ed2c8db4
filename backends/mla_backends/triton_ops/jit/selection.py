"""Scores of an indexer, and the best of them: what a token's heads say of each key that it sees."""

import triton
import triton.language as tl

from mla_backends.triton_ops.jit.formats import e4m3_numbers
from mla_backends.triton_ops.jit.shared import follow, last_from

SCALE_BYTES = tl.constexpr(4)
# What changes from step to step: see latent.py.
CHANGING = [
    "weights", "block_table", "kv_lens", "cu_q", "table_row", "requests", "first", "width", "few",
    "out_token",
]  # fmt: skip


@triton.jit
def seen_by(token, kv_lens, cu_q, requests):
    """Return the request of a token, and how many keys the token sees; 0 or less where it sees none."""
    request = last_from(token, cu_q, requests, 1, 1, 0)
    return request, tl.load(kv_lens + request) - tl.load(cu_q + request + 1) + token + 1


@triton.jit(do_not_specialize=CHANGING)
def score_latents(
    q,  # [T, H, D]
    weights,  # [T, H] fp32
    cache,  # [pages, PAGE, D], or bytes [pages, PAGE, D + 4]; contiguous
    block_table,  # [B, n] int32
    kv_lens,  # [B] int32
    cu_q,  # [B + 1] int32
    scores,  # [tokens, width] fp32
    q_token,  # strides, in elements
    q_head,
    weights_token,
    table_row,
    requests,  # B
    first,  # token of the first row of scores
    width,
    few,  # a token that sees no more keys needs no scores
    HEADS: tl.constexpr,
    WIDE_HEADS: tl.constexpr,  # the next power of two of at least 16
    DEPTH: tl.constexpr,  # D
    WIDE: tl.constexpr,  # as WIDE_HEADS
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    FORMAT: tl.constexpr,  # "plain" or "fp8"
    NATIVE: tl.constexpr,  # see formats.py
    EARLY: tl.constexpr,  # see `follow`
):
    """Write the scores of some keys, and -inf for those that a token does not see.

    Grid: (tokens, blocks of keys).
    """
    follow(EARLY)
    token = first + tl.program_id(0)
    request, seen = seen_by(token, kv_lens, cu_q, requests)
    if seen <= few:
        return
    start = tl.program_id(1) * KEYS
    place = start + tl.arange(0, KEYS)
    target = scores + tl.program_id(0).to(tl.int64) * width + place
    if start >= seen:
        tl.store(target, tl.full([KEYS], float("-inf"), tl.float32), mask=place < width)
        return

    head, channel, at = tl.arange(0, WIDE_HEADS), tl.arange(0, WIDE), token.to(tl.int64)
    queries = tl.load(
        q + at * q_token + head[:, None] * q_head + channel[None, :],
        mask=(head < HEADS)[:, None] & (channel < DEPTH)[None, :],
        other=0.0,
    )
    weight = tl.load(weights + at * weights_token + head, mask=head < HEADS, other=0.0)
    there = place < seen
    inside = there[:, None] & (channel < DEPTH)[None, :]
    table = block_table + request.to(tl.int64) * table_row
    page = tl.load(table + place // PAGE, mask=there, other=0).to(tl.int64)
    if FORMAT == "plain":
        row = cache + (page * PAGE + place % PAGE) * DEPTH
        keys = tl.load(row[:, None] + channel[None, :], mask=inside, other=0.0).to(queries.dtype)
    else:  # a page has the codes of all its tokens first, and then their scales
        codes = cache + page * (PAGE * (DEPTH + SCALE_BYTES))
        row = codes + place % PAGE * DEPTH
        keys = e4m3_numbers(
            tl.load(row[:, None] + channel[None, :], mask=inside, other=0), queries.dtype, NATIVE
        )
        of_token = codes + PAGE * DEPTH + place % PAGE * SCALE_BYTES
        scale = tl.load(of_token.to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
    said = tl.dot(queries, tl.trans(keys))
    score = tl.sum(tl.maximum(said, 0.0) * weight[:, None], 0)
    if FORMAT != "plain":
        score = score * scale
    tl.store(target, tl.where(there, score, float("-inf")), mask=place < width)


# --------------------------------------------------------------------------------------------- the best
@triton.jit
def ordered(score):
    """Return uint32 in the order of fp32 numbers: bits of negative ones are inverted, others come above."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def leading(key, low):
    """Return the bits of keys but for the `low` last, which may be all 32."""
    return (key.to(tl.uint64) >> low).to(tl.uint32)


@triton.jit(do_not_specialize=CHANGING)
def take_best(
    scores,  # [tokens, width] fp32
    kv_lens,  # [B] int32
    cu_q,  # [B + 1] int32
    out,  # [T, topk] int32
    out_token,  # stride, in elements
    requests,  # B
    first,  # token of the first row of scores
    width,
    topk,
    TILE: tl.constexpr,
    BITS: tl.constexpr,  # of a digit
    EARLY: tl.constexpr,  # see `follow`
):
    """Write the places of the best scores that a token sees, in ascending order, and -1 behind them.

    Scores are compared as integers, digit after digit from the first. Each pass counts the digits of scores
    that begin as the last to be taken does, and finds its next digit. Passes end once whatever begins so is
    taken. Of equal scores, those of the lowest places are taken. Grid: (tokens,).
    """
    follow(EARLY)
    token = first + tl.program_id(0)
    _, seen = seen_by(token, kv_lens, cu_q, requests)
    row = scores + tl.program_id(0).to(tl.int64) * width
    count = tl.minimum(tl.maximum(seen, 0), topk)
    place, digits = tl.arange(0, TILE), tl.arange(0, 1 << BITS)

    begins, low = tl.full([], 0, tl.uint32), 32  # how the last score begins, but for so many bits
    rest, alike = count, seen  # still to be taken of those that begin so; how many there are, or more
    while (low > 0) & (rest < alike):
        shift = tl.maximum(low - BITS, 0)
        counts = tl.zeros([1 << BITS], tl.int32)
        for start in range(0, seen, TILE):
            there = start + place < seen
            key = ordered(tl.load(row + start + place, mask=there, other=0.0))
            there = there & (leading(key, low) == begins)
            theirs = (key >> shift).to(tl.int32) & ((1 << BITS) - 1)
            counts += tl.histogram(tl.where(there, theirs, 0), 1 << BITS)  # others count as the lowest
        upward = tl.cumsum(counts, 0, reverse=True)
        digit = tl.max(tl.where(upward >= rest, digits, 0), 0)
        alike = tl.sum(tl.where(digits == digit, counts, 0), 0)
        rest -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        begins = (begins << (low - shift)) | digit.to(tl.uint32)  # where they overlap, they are the same
        low = shift

    above, tied = 0, 0  # so far
    target = out + token.to(tl.int64) * out_token
    for start in range(0, seen, TILE):
        there = start + place < seen
        begin = leading(ordered(tl.load(row + start + place, mask=there, other=0.0)), low)
        higher, equal = there & (begin > begins), there & (begin == begins)
        sums = tl.cumsum(higher.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        tie = tied + (sums >> 16)
        at = above + (sums & 0xFFFF) + tl.minimum(tie, rest) - 1
        tl.store(target + at, start + place, mask=higher | (equal & (tie <= rest)))
        above += tl.sum(higher.to(tl.int32), 0)
        tied += tl.sum(equal.to(tl.int32), 0)
    for start in range(0, topk, TILE):
        behind = start + place
        tl.store(target + behind, tl.full([TILE], -1, tl.int32), mask=(behind >= count) & (behind < topk))
