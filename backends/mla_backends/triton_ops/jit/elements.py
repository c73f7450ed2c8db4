"""How an element of the latent cache becomes a number: a compile-time choice of the attention kernel."""

import triton
import triton.language as tl

# Formats of a cached element. Another one is another branch of `decoded`, and no second kernel.
PLAIN = "plain"  # it is the number


@triton.jit
def decoded(raw, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Return cached elements `raw` as numbers of `dtype`, which the products take."""
    tl.static_assert(FORMAT == "plain", "the cache holds elements of an unknown format")
    return raw.to(dtype)
