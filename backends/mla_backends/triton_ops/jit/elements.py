"""How an element of the latent cache becomes a number: a compile-time choice of the attention kernel."""

import triton
import triton.language as tl


@triton.jit
def decoded(raw, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Return cached elements `raw` as numbers of `dtype`, which the products take.

    Formats: "plain", where an element is the number. Another format is another branch, and no second kernel.
    """
    tl.static_assert(FORMAT == "plain", "the cache holds elements of an unknown format")
    return raw.to(dtype)
