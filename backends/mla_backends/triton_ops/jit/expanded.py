"""Multi-head attention over ragged segments: flash attention, all segments in one launch."""

import triton
import triton.language as tl

from mla_backends.triton_ops.jit.shared import close, fold, follow, place_of

LN2 = tl.constexpr(0.6931471805599453)


# What changes from batch to batch: specialised on its value or alignment, a kernel would be compiled anew.
@triton.jit(do_not_specialize=["cu_q", "cu_k", "lse", "segments", "blocks"])
def attend_expanded(
    q,  # [Tq, h, d], d = WIDTH
    k,  # [Tk, h, d]
    v,  # [Tk, h, e], e = VALUES
    cu_q,  # [segments + 1] int32
    cu_k,  # [segments + 1] int32
    out,  # [Tq, h, e]
    lse,  # [Tq, h] fp32
    scale,  # of the softmax, times log2(e)
    q_token,  # strides, in elements
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    lse_token,
    lse_head,
    segments,
    blocks,  # of ROWS queries of a segment, where all have equally many
    RAGGED: tl.constexpr,  # segments have different numbers of queries
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    FRONT: tl.constexpr,  # the largest power of two up to WIDTH, at least 16: 192 channels are 128 and 64
    BACK: tl.constexpr,  # the next power of two, of at least 16, of those that remain, or 0
    WIDE_VALUES: tl.constexpr,  # the next power of two of VALUES
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LSE: tl.constexpr,
    EARLY: tl.constexpr,  # see `follow`
):
    """Attend ROWS queries of one segment and head to all keys they see. Grid: (blocks of all segments, h)."""
    follow(EARLY)
    segment, block = place_of(tl.program_id(0), cu_q, segments, blocks, 1, ROWS, RAGGED)
    head = tl.program_id(1).to(tl.int64)
    first_q = tl.load(cu_q + segment)
    queries = tl.load(cu_q + segment + 1) - first_q
    first_k = tl.load(cu_k + segment).to(tl.int64)
    keys = tl.load(cu_k + segment + 1) - tl.load(cu_k + segment)
    if block * ROWS >= queries:
        return
    block = (queries + ROWS - 1) // ROWS - 1 - block  # the last see the most keys: they start first

    token = block * ROWS + tl.arange(0, ROWS)
    owned = token < queries
    at = (first_q + token).to(tl.int64)
    if CAUSAL:
        visible = keys - queries + token  # the last key that a query sees
        high = tl.minimum(keys, keys - queries + tl.minimum(block * ROWS + ROWS, queries))
        all_see = tl.maximum(0, tl.minimum(keys, keys - queries + block * ROWS + 1)) // KEYS * KEYS
    else:
        visible = tl.full([ROWS], 0, tl.int32) + keys - 1
        high = keys
        all_see = keys // KEYS * KEYS
    front = tl.arange(0, FRONT)
    has_front = front < WIDTH
    q_row = q + at * q_token + head * q_head
    q_front = tl.load(q_row[:, None] + front[None, :], mask=owned[:, None] & has_front[None, :], other=0.0)
    q_back = q_front
    if BACK > 0:
        back = FRONT + tl.arange(0, BACK)
        q_back = tl.load(
            q_row[:, None] + back[None, :], mask=owned[:, None] & (back < WIDTH)[None, :], other=0.0
        )
    column = tl.arange(0, WIDE_VALUES)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    value = tl.full([ROWS, WIDE_VALUES], 0.0, tl.float32)
    k_row = k + first_k * k_token + head * k_head
    v_row = v + first_k * v_token + head * v_head

    for start in range(0, all_see, KEYS):  # keys that exist and that every query sees
        top, total, value = step(
            q_front, q_back, k_row, v_row, k_token, v_token, start, high, visible, scale, top, total, value,
            WIDTH, VALUES, FRONT, BACK, WIDE_VALUES, KEYS, False,
        )  # fmt: skip
    for start in range(all_see, high, KEYS):
        top, total, value = step(
            q_front, q_back, k_row, v_row, k_token, v_token, start, high, visible, scale, top, total, value,
            WIDTH, VALUES, FRONT, BACK, WIDE_VALUES, KEYS, True,
        )  # fmt: skip

    whole, sums = close(top, total)
    out_row = out + at * out_token + head * out_head
    tl.store(
        out_row[:, None] + column[None, :],
        (value / whole[:, None]).to(out.dtype.element_ty),
        mask=owned[:, None] & (column < VALUES)[None, :],
    )
    if HAS_LSE:
        tl.store(lse + at * lse_token + head * lse_head, sums * LN2, mask=owned)


@triton.jit
def step(
    q_front,  # [ROWS, FRONT]
    q_back,  # [ROWS, BACK]
    k_row,  # of the segment's first key and the head
    v_row,
    k_token,
    v_token,
    start,  # the step's first key
    high,  # keys that some query sees
    visible,  # [ROWS]: the last key that each sees
    scale,
    top,  # [ROWS]
    total,  # [ROWS]
    value,  # [ROWS, WIDE_VALUES]
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    FRONT: tl.constexpr,
    BACK: tl.constexpr,
    WIDE_VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,  # some query does not see some of these keys
):
    """Attend KEYS keys: return `top`, `total` and `value` with them."""
    place = start + tl.arange(0, KEYS)
    there = place < high
    key = k_row + place.to(tl.int64) * k_token
    front = tl.arange(0, FRONT)
    column = tl.arange(0, WIDE_VALUES)
    has_front = (front < WIDTH)[None, :]
    has_column = (column < VALUES)[None, :]
    if MASKED:
        has_front = has_front & there[:, None]
        has_column = has_column & there[:, None]
    k_front = tl.load(key[:, None] + front[None, :], mask=has_front, other=0.0)
    score = tl.dot(q_front, tl.trans(k_front))
    if BACK > 0:
        back = FRONT + tl.arange(0, BACK)
        has_back = (back < WIDTH)[None, :]
        if MASKED:
            has_back = has_back & there[:, None]
        k_back = tl.load(key[:, None] + back[None, :], mask=has_back, other=0.0)
        score = tl.dot(q_back, tl.trans(k_back), score)
    score = score * scale
    if MASKED:
        seen = (place[None, :] <= visible[:, None]) & there[None, :]
        score = tl.where(seen, score, float("-inf"))
    weight, shrink, top, total = fold(score, top, total)
    its_values = v_row + place.to(tl.int64) * v_token
    values = tl.load(its_values[:, None] + column[None, :], mask=has_column, other=0.0)
    value = tl.dot(weight.to(values.dtype), values, value * shrink[:, None])
    return top, total, value
