"""Which rows of which request a program works on."""

import triton
import triton.language as tl


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
        low = program * 0
        high = low + requests
        while high - low > 1:  # request `low` starts at this program or before, request `high` behind it
            middle = (low + high) // 2
            begins = (tl.load(cu_q + middle).to(tl.int64) * HEADS // rows).to(tl.int32) + middle
            if begins <= program:
                low = middle
            else:
                high = middle
        begins = (tl.load(cu_q + low).to(tl.int64) * HEADS // rows).to(tl.int32) + low
        return low, program - begins
    else:
        return program // blocks, program % blocks
