"""Scores of an indexer: what a token's heads say of each key that it sees, weighted and summed."""

import triton
import triton.language as tl

from mla_backends.triton_ops.jit.formats import e4m3_numbers
from mla_backends.triton_ops.jit.shared import follow, last_from

SCALE_BYTES = tl.constexpr(4)
# What changes from step to step: see latent.py.
CHANGING = ["weights", "block_table", "kv_lens", "cu_q", "table_row", "requests", "first", "width"]


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
    request = last_from(token, cu_q, requests, 1, 1, 0)
    seen = tl.load(kv_lens + request) - tl.load(cu_q + request + 1) + token + 1
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
