// The product of bf16 values that is fastest with the instruction set at hand. `wide` asks for fp32 where
// pairs of bf16 can be multiplied as they are.
#pragma once
#include "fp32_gemm.h"
#include "tiles.h"
#if MLA_TILES
#include "tile_gemm.h"
#elif MLA_DOT_BF16
#include "pairs_gemm.h"
#endif

namespace mla {

static inline void multiply(const Product<float, float>& p, bool, int threads) {
    fp32::multiply(p, threads);
}
static inline void multiply(const Product<bf16, bf16>& p, bool wide, int threads) {
#if MLA_TILES
    return tiled::multiply(p, threads);
#elif MLA_DOT_BF16
    if (!wide) return pairs::multiply(p, threads);
#endif
    fp32::multiply(p, threads);
}

}  // namespace mla
