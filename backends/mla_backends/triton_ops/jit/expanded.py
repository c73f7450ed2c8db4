"""Multi-head attention over ragged segments: flash attention, all segments in one launch."""

import triton
import triton.language as tl

from mla_backends.triton_ops.jit.softmax import close, fold

LN2 = tl.constexpr(0.6931471805599453)


# What changes from batch to batch: specialised on its value or alignment, a kernel would be compiled anew.
@triton.jit(do_not_specialize=["cu_q", "cu_k", "lse", "blocks"])
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
    blocks,  # of ROWS queries, of the longest segment
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    FRONT: tl.constexpr,  # the largest power of two up to WIDTH, at least 16: 192 channels are 128 and 64
    BACK: tl.constexpr,  # the next power of two, of at least 16, of those that remain, or 0
    WIDE_VALUES: tl.constexpr,  # the next power of two of VALUES
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Attend ROWS queries of one segment and head to all keys they see. Grid: (segments * blocks, h)."""
    segment = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # the last see the most keys: they start first
    head = tl.program_id(1).to(tl.int64)
    first_q = tl.load(cu_q + segment)
    queries = tl.load(cu_q + segment + 1) - first_q
    first_k = tl.load(cu_k + segment)
    keys = tl.load(cu_k + segment + 1) - first_k
    if block * ROWS >= queries:
        return

    token = block * ROWS + tl.arange(0, ROWS)
    owned = token < queries
    at = (first_q + token).to(tl.int64)
    if CAUSAL:
        visible = keys - queries + token  # the last key that a query sees
        high = tl.minimum(keys, keys - queries + tl.minimum(block * ROWS + ROWS, queries))
    else:
        visible = tl.full([ROWS], 0, tl.int32) + keys - 1
        high = keys
    front = tl.arange(0, FRONT)
    has_front = front < WIDTH
    q_row = q + at * q_token + head * q_head
    q_front = tl.load(q_row[:, None] + front[None, :], mask=owned[:, None] & has_front[None, :], other=0.0)
    if BACK > 0:
        back = FRONT + tl.arange(0, BACK)
        has_back = back < WIDTH
        q_back = tl.load(q_row[:, None] + back[None, :], mask=owned[:, None] & has_back[None, :], other=0.0)
    column = tl.arange(0, WIDE_VALUES)
    has_column = column < VALUES
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    value = tl.full([ROWS, WIDE_VALUES], 0.0, tl.float32)

    for start in range(0, high, KEYS):
        place = start + tl.arange(0, KEYS)
        there = place < high
        row = (first_k + place).to(tl.int64)
        k_row = k + row * k_token + head * k_head
        k_front = tl.load(
            k_row[:, None] + front[None, :], mask=there[:, None] & has_front[None, :], other=0.0
        )
        score = tl.dot(q_front, tl.trans(k_front))
        if BACK > 0:
            k_back = tl.load(
                k_row[:, None] + back[None, :], mask=there[:, None] & has_back[None, :], other=0.0
            )
            score = tl.dot(q_back, tl.trans(k_back), score)
        seen = (place[None, :] <= visible[:, None]) & there[None, :]
        score = tl.where(seen, score * scale, float("-inf"))
        weight, shrink, top, total = fold(score, top, total)
        v_row = v + row * v_token + head * v_head
        values = tl.load(
            v_row[:, None] + column[None, :], mask=there[:, None] & has_column[None, :], other=0.0
        )
        value = tl.dot(weight.to(values.dtype), values, value * shrink[:, None])

    whole, sums = close(top, total)
    out_row = out + at * out_token + head * out_head
    tl.store(
        out_row[:, None] + column[None, :],
        (value / whole[:, None]).to(out.dtype.element_ty),
        mask=owned[:, None] & has_column[None, :],
    )
    if HAS_LSE:
        tl.store(lse + at * lse_token + head * lse_head, sums * LN2, mask=owned)
