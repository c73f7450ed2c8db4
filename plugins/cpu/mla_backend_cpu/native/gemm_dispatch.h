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

template <class... Arguments>
static inline void linear(bool wide, Arguments... arguments) {
#if MLA_TILES
    return tiled::linear(arguments...);
#elif MLA_DOT_BF16
    if (!wide) return pairs::linear(arguments...);
#endif
    fp32::linear<bf16>(arguments...);
}

template <class... Arguments>
static inline void batched_linear(bool wide, Arguments... arguments) {
#if MLA_TILES
    return tiled::batched_linear(arguments...);
#elif MLA_DOT_BF16
    if (!wide) return pairs::batched_linear(arguments...);
#endif
    fp32::batched_linear<bf16>(arguments...);
}

}  // namespace mla
