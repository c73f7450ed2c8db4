"""Absorbed attention over latent pages: flash decoding, split over the keys, and the merge of the parts.

A program attends ROWS query rows (a row is one head of one token) of one request to one part of its keys. The
tile of latents is loaded once: transposed it is the keys, as it lies the values. Where a compiler keeps the
whole of it in too many registers, it is multiplied and summed in two halves. Sums of exponentials are in
powers of two, natural only in `lse`.

How many parts a request has is derived from its length, on the device and in both kernels alike, so that a
captured launch follows lengths that change. A request of one part writes its output at once.

Where tokens select their keys, each is a request of its own: its keys are what it selects, in that order.
"""

import re

import triton
import triton.language as tl

from mla_backends.triton_ops.jit.formats import cached, int8_scales
from mla_backends.triton_ops.jit.shared import close, fold, follow, last_from, place_of

LN2 = tl.constexpr(0.6931471805599453)
# Where Triton sees that a product feeds another, it lays all warps along the rows of the first. From this
# many rows on, two groups of warps would compute the same scores: see `hidden`. Before 3.6, what this saves
# is spilled.
SPREAD_ROWS = tl.constexpr(64)
SPREADS = tl.constexpr(tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= (3, 6))
# What changes from step to step: specialised on its value or alignment, a kernel would be compiled anew.
TABLES = ["block_table", "kv_lens", "cu_q", "lse", "part_lse", "table_row"]
CHANGING = [*TABLES, "requests", "blocks", "rows", "keys_per_split", "max_splits"]


@triton.jit
def parts_of(keys, keys_per_split, max_splits):
    """Return into how many parts a request of this many keys is split."""
    return tl.minimum(tl.maximum((keys + keys_per_split - 1) // keys_per_split, 1), max_splits)


@triton.jit
def rows_of(
    program,
    kv_lens,  # [B] int32
    cu_q,  # [B + 1] int32
    requests,  # B
    blocks,  # of a request, or of a token that selects, where all have equally many
    HEADS: tl.constexpr,
    rows,  # of a block
    RAGGED: tl.constexpr,
    TOPK: tl.constexpr,
):
    """Return a program's request and block of rows, and the first token, tokens and keys of these blocks."""
    if TOPK > 0:
        first = program // blocks
        request = last_from(first, cu_q, requests, 1, 1, 0)
        return request, program % blocks, first, 1, tl.minimum(tl.load(kv_lens + request), TOPK)
    else:
        request, block = place_of(program, cu_q, requests, blocks, HEADS, rows, RAGGED)
        first = tl.load(cu_q + request)
        queries = tl.load(cu_q + request + 1) - first
        return request, block, first, queries, tl.load(kv_lens + request)


@triton.jit(do_not_specialize=CHANGING)
def attend_latent(
    q,  # [T, h, c + r]
    cache,  # [pages, PAGE, TOKEN], contiguous
    block_table,  # [B, n] int32
    kv_lens,  # [B] int32
    cu_q,  # [B + 1] int32
    out,  # [T, h, c]
    lse,  # [T, h] fp32
    part_out,  # [T, h, max_splits, c] fp32
    part_lse,  # [T, h, max_splits] fp32, in powers of two
    selection,  # [T, TOPK] int32, positions within the request or -1; None without TOPK
    selection_row,
    scale,  # of the softmax, times log2(e), and times that of cached numbers
    stored_scale,  # of cached numbers of "fp8"
    q_token,  # strides, in elements
    q_head,
    table_row,
    out_token,
    out_head,
    lse_token,
    lse_head,
    requests,  # B
    blocks,  # of ROWS rows of a request, where all have equally many new tokens
    keys_per_split,
    max_splits,
    RAGGED: tl.constexpr,  # requests have different numbers of new tokens
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,  # c
    ROPE: tl.constexpr,  # r
    PIECE: tl.constexpr,  # channels of a product: the power of two that holds c, or half of it
    HALVES: tl.constexpr,  # the latter: products and sums in two halves
    WIDE_ROPE: tl.constexpr,  # the next power of two of at least 16, or 0
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,  # some request has several new tokens
    SPREAD: tl.constexpr,  # hide scores of many rows: see `hidden`
    TOPK: tl.constexpr,  # keys that a token selects; 0: it attends to all that it sees
    HAS_LSE: tl.constexpr,
    TOKEN: tl.constexpr,  # elements of a cached token
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,  # see formats.py
    EARLY: tl.constexpr,  # see `follow`
):
    """Attend. Grid: (blocks of all requests, max_splits)."""
    follow(EARLY)
    request, block, first, queries, keys = rows_of(
        tl.program_id(0), kv_lens, cu_q, requests, blocks, HEADS, ROWS, RAGGED, TOPK
    )
    split = tl.program_id(1)
    parts = parts_of(keys, keys_per_split, max_splits)
    if (block * ROWS >= queries * HEADS) | (split >= parts):
        return

    token, head, owned, at = places_of(block, first, queries, HEADS, ROWS)
    newest = tl.minimum((block * ROWS + ROWS - 1) // HEADS, queries - 1)  # token of the last row
    length = ((keys + parts - 1) // parts + KEYS - 1) // KEYS * KEYS
    low = split * length
    high = tl.minimum(low + length, keys - queries + newest + 1)
    visible = keys - queries + token  # the last key that a row sees

    channel = tl.arange(0, PIECE)
    has_channel = channel < LATENT
    upper = PIECE + channel
    has_upper = upper < LATENT
    q_row = q + at * q_token + head * q_head
    q_latent = tl.load(
        q_row[:, None] + channel[None, :], mask=owned[:, None] & has_channel[None, :], other=0.0
    )
    if HALVES:
        q_upper = tl.load(
            q_row[:, None] + upper[None, :], mask=owned[:, None] & has_upper[None, :], other=0.0
        )
        value_upper = tl.full([ROWS, PIECE], 0.0, tl.float32)
    if ROPE > 0:
        turn = tl.arange(0, WIDE_ROPE)
        has_turn = turn < ROPE
        q_rope = tl.load(
            q_row[:, None] + LATENT + turn[None, :], mask=owned[:, None] & has_turn[None, :], other=0.0
        )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    value = tl.full([ROWS, PIECE], 0.0, tl.float32)
    table = block_table + request.to(tl.int64) * table_row

    never = requests < 1
    HIDES: tl.constexpr = (SPREADS and SPREAD) and ROWS >= SPREAD_ROWS
    if TOPK > 0:
        chosen = selection + first.to(tl.int64) * selection_row
    elif PAGE % KEYS == 0:  # a step stays within a page, whose number is fetched a step ahead
        page = tl.load(table + low // PAGE, mask=low < high, other=0)
    for start in range(low, high, KEYS):
        place = start + tl.arange(0, KEYS)
        there = place < high
        if TOPK > 0:
            place = tl.load(chosen + place, mask=there, other=-1)
            there = place >= 0
        if PAGE % KEYS == 0 and TOPK == 0:
            if FORMAT == "plain":
                slot = page.to(tl.int64) * PAGE + start % PAGE
                key = cache + (slot + tl.arange(0, KEYS)) * TOKEN
            else:  # in fewer registers, and more instructions
                key = cache + page.to(tl.int64) * (PAGE * TOKEN) + (start % PAGE + tl.arange(0, KEYS)) * TOKEN
            following = start + KEYS
            page = tl.load(table + following // PAGE, mask=following < high, other=0)
        else:
            pages = tl.load(table + place // PAGE, mask=there, other=0).to(tl.int64)
            key = cache + (pages * PAGE + place % PAGE) * TOKEN
        score = tl.full([ROWS, KEYS], 0.0, tl.float32)
        if ROPE > 0:
            _, score = multiply(
                q_rope, key, there, score, never, HIDES, LATENT, WIDE_ROPE, LATENT, ROPE, FORMAT, NATIVE
            )
        if FORMAT == "int8":
            of_keys = score * int8_scales(key, there, 1, LATENT, ROPE)[None, :]
            score = tl.full([ROWS, KEYS], 0.0, tl.float32)
        latent, score = multiply(
            q_latent, key, there, score, never, HIDES, 0, PIECE, LATENT, ROPE, FORMAT, NATIVE
        )
        if HALVES:
            latent_upper, score = multiply(
                q_upper, key, there, score, never, HIDES, PIECE, PIECE, LATENT, ROPE, FORMAT, NATIVE
            )
        if FORMAT == "int8":
            by = int8_scales(key, there, 0, LATENT, ROPE)[None, :]
            score = score * by + of_keys
        if CAUSAL and HEADS % ROWS != 0:  # else all rows are of one token, which sees what is before `high`
            seen = (place[None, :] <= visible[:, None]) & there[None, :]
        else:
            seen = there[None, :]
        score = tl.where(seen, score * scale, float("-inf"))
        weight, shrink, top, total = fold(score, top, total)
        if FORMAT == "int8":
            weight = weight * by
        value = tl.dot(weight.to(latent.dtype), latent, value * shrink[:, None])
        if HALVES:
            value_upper = tl.dot(weight.to(latent.dtype), latent_upper, value_upper * shrink[:, None])

    whole, sums = close(top, total)
    if FORMAT == "fp8":  # which has a register too few to hold them through the loop
        whole = whole / stored_scale
        program = hidden(tl.program_id(0), never, True)
        _, block, first, queries, keys = rows_of(
            program, kv_lens, cu_q, requests, blocks, HEADS, ROWS, RAGGED, TOPK
        )
    _, head, owned, at = places_of(hidden(block, never, True), first, queries, HEADS, ROWS)
    value = value / whole[:, None]
    target = owned[:, None] & has_channel[None, :]
    if HALVES:
        value_upper = value_upper / whole[:, None]
        target_upper = owned[:, None] & has_upper[None, :]
    if parts > 1:
        place_of_part = (at * HEADS + head) * max_splits + split
        part_row = part_out + place_of_part * LATENT
        tl.store(part_lse + place_of_part, sums, mask=owned)
        tl.store(part_row[:, None] + channel[None, :], value, mask=target)
        if HALVES:
            tl.store(part_row[:, None] + upper[None, :], value_upper, mask=target_upper)
        return
    out_row = out + at * out_token + head * out_head
    tl.store(out_row[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=target)
    if HALVES:
        tl.store(out_row[:, None] + upper[None, :], value_upper.to(out.dtype.element_ty), mask=target_upper)
    if HAS_LSE:
        tl.store(lse + at * lse_token + head * lse_head, sums * LN2, mask=owned)


@triton.jit
def places_of(block, first, queries, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Return the token of each row within its request, its head, whether it is the request's, and its token.

    They are asked for anew behind the loop, so that no registers hold them through it.
    """
    row = block * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    return token, (row % HEADS).to(tl.int64), token < queries, (first + token).to(tl.int64)


@triton.jit
def multiply(
    q,  # [ROWS, N]
    key,  # [KEYS]: where each cached token begins
    there,  # [KEYS]: which of them are read
    score,  # [ROWS, KEYS] fp32
    never,  # see `hidden`
    HIDES: tl.constexpr,  # whether scores are hidden
    FIRST: tl.constexpr,  # see `cached`
    N: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Return some channels of the keys [KEYS, N], and the scores with the product of these channels.

    Numbers over any scale have more digits than products take. Large logits need them: they are multiplied
    as two numbers, of which values need only the first.
    """
    numbers = cached(key, there, q.dtype, FIRST, N, LATENT, ROPE, FORMAT, NATIVE)
    keys = hidden(numbers.to(q.dtype), never, FORMAT != "plain")
    score = hidden(tl.dot(q, tl.trans(keys), score), never, HIDES)
    if numbers.dtype != q.dtype:
        rest = hidden((numbers - keys.to(tl.float32)).to(q.dtype), never, True)
        score = hidden(tl.dot(q, tl.trans(rest), score), never, HIDES)
    return keys, score


@triton.jit
def hidden(numbers, never, HIDES: tl.constexpr):
    """Return what Triton does not connect with where it comes from: scores with their product, if HIDES.

    `never` is false. Triton looks through sums and through conditions of the loop, but not through one that
    was known before it. Numbers that it sees decoded are decoded anew for each product, by several warps.
    """
    if HIDES:
        if never:
            numbers = -numbers
    return numbers


@triton.jit(do_not_specialize=CHANGING)
def merge_latent(
    kv_lens,  # [B] int32
    cu_q,  # [B + 1] int32
    out,  # [T, h, c]
    lse,  # [T, h] fp32
    part_out,  # [T, h, max_splits, c] fp32
    part_lse,  # [T, h, max_splits] fp32, in powers of two
    out_token,  # strides, in elements
    out_head,
    lse_token,
    lse_head,
    requests,  # B
    blocks,  # of `rows` rows of a request, where all have equally many new tokens
    rows,  # of a program, one after another
    keys_per_split,
    max_splits,
    RAGGED: tl.constexpr,  # requests have different numbers of new tokens
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,  # c
    CHANNELS: tl.constexpr,  # of a program, a power of two
    PARTS: tl.constexpr,  # parts of a step
    TOPK: tl.constexpr,  # as in `attend_latent`
    HAS_LSE: tl.constexpr,
    EARLY: tl.constexpr,  # see `follow`
):
    """Merge some channels of the parts of some rows of a request.

    Grid: (blocks of all requests, ceil(c / CHANNELS)). Programs share the channels of a row because one
    request of few heads has few rows. Each reads the log-sum-exps of a row once: as much as one channel more.
    """
    follow(EARLY)
    _, block, first, queries, keys = rows_of(
        tl.program_id(0), kv_lens, cu_q, requests, blocks, HEADS, rows, RAGGED, TOPK
    )
    end = queries * HEADS
    parts = parts_of(keys, keys_per_split, max_splits)
    start = block * rows
    if (start >= end) | (parts == 1):
        return
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    for number in range(tl.minimum(rows, end - start)):
        row = start + number
        place = (first.to(tl.int64) * HEADS + row) * max_splits
        value, sums = merged(part_out, part_lse, place, parts, channel, LATENT, CHANNELS, PARTS)
        at = (first + row // HEADS).to(tl.int64)
        head = (row % HEADS).to(tl.int64)
        target = out + at * out_token + head * out_head + channel
        tl.store(target, value.to(out.dtype.element_ty), mask=channel < LATENT)
        if HAS_LSE:
            tl.store(lse + at * lse_token + head * lse_head, sums * LN2, mask=tl.program_id(1) == 0)


@triton.jit
def merged(
    part_out,
    part_lse,
    place,  # of the row's first part
    parts,
    channel,  # [CHANNELS]
    LATENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return the values [CHANNELS] of one row, all parts taken together, and the log2 of its sums."""
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    value = tl.full([CHANNELS], 0.0, tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        score = tl.load(part_lse + place + part, mask=part < parts, other=float("-inf"))[None, :]
        weight, shrink, top, total = fold(score, top, total)
        several = tl.load(
            part_out + (place + part)[:, None] * LATENT + channel[None, :],
            mask=(part < parts)[:, None] & (channel < LATENT)[None, :],
            other=0.0,
        )
        value = value * shrink + tl.sum(tl.trans(weight) * several, 0)
    whole, sums = close(top, total)
    return value / whole, tl.sum(sums, 0)
