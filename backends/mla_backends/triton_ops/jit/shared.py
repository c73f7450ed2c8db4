"""What kernels share: when they begin, which rows a program has, the running softmax."""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # old ones, which look up even what is not compiled
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait for the launch before, beside which this one may have been started, and let the next one start.

    Every program does so before it reads or writes anything, even one that has nothing else to do: where a
    launch has ended, all launches before it have.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def place_of(
    program,
    cu_q,  # [B + 1] int32
    requests,  # B
    blocks,  # of a request, where all have equally many tokens
    HEADS: tl.constexpr,  # rows per token
    rows,  # of a block
    RAGGED: tl.constexpr,
):
    """Return the request that a program belongs to, and the block of rows within it.

    Ragged requests start at program `cu_q[b] * HEADS // rows + b`, so that a search finds them, and at most
    one program of each has nothing to do. Such a block lies behind the request's rows.
    """
    if RAGGED:
        request = last_from(program, cu_q, requests, HEADS, rows, 1)
        return request, program - begin(cu_q, request, HEADS, rows, 1)
    else:
        return program // blocks, program % blocks


@triton.jit
def last_from(place, cu_q, requests, HEADS: tl.constexpr, rows, GAP: tl.constexpr):
    """Return the last request that begins at a place or before it: see `begin`."""
    low = place * 0
    high = low + requests
    while high - low > 1:  # request `low` begins at this place or before, request `high` behind it
        middle = (low + high) // 2
        if begin(cu_q, middle, HEADS, rows, GAP) <= place:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def begin(cu_q, request, HEADS: tl.constexpr, rows, GAP: tl.constexpr):
    """Return where a request begins, in blocks of rows, with so many blocks between one and the next."""
    return (tl.load(cu_q + request).to(tl.int64) * HEADS // rows).to(tl.int32) + request * GAP


@triton.jit
def fold(score, top, total):
    """Take the scores [ROWS, KEYS] of a step, -inf where a row sees no key, into the sums so far.

    Returns the weights [ROWS, KEYS] of the step, by what values so far shrink [ROWS], and the new `top` and
    `total` [ROWS].
    """
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
    weight = tl.math.exp2(score - base[:, None])
    shrink = tl.math.exp2(top - base)
    return weight, shrink, higher, total * shrink + tl.sum(weight, 1)


@triton.jit
def close(top, total):
    """Return what values are divided by, and the log2 of the sums: 1 and -inf for a row that saw no key."""
    some = total > 0
    whole = tl.where(some, total, 1.0)
    return whole, tl.where(some, top + tl.math.log2(whole), float("-inf"))
