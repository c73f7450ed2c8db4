"""The running softmax that both attention kernels fold their scores into, in powers of two."""

import triton
import triton.language as tl


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
