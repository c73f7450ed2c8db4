// AMX tiles: eight registers of 16 rows by 64 bytes, and blocks of up to four sums over them.
//
// The instructions are inline assembly: the compiler's macros take literal register numbers only, and do not
// declare that they read memory, so that stores before them may be moved after them. If MLA_EMULATE_TILES is
// defined, plain C++ does the same, so that all code on top can run, and be checked, on any machine.
#pragma once
#include <cstdint>

#include "simd.h"

#if defined(MLA_EMULATE_TILES)
#define MLA_TILES 1
#include "tile_emulation.h"
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define MLA_TILES 1

namespace mla {
namespace tile {

static inline void configure(const void* config) {
    asm volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])config));
}
static inline void release() {
    asm volatile("tilerelease" ::: "memory");
}
template <int T>
static inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Rows lie `stride` bytes apart.
template <int T>
static inline void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
// The same of what is not read again soon: it does not take the place of other lines in the first-level cache.
template <int T>
static inline void load_once(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C += A B: A has rows of bf16 pairs, B a row for every pair of A's columns.
template <int C, int A, int B>
static inline void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace tile
}  // namespace mla
#else
#define MLA_TILES 0
#endif

namespace mla {

#if MLA_TILES
constexpr int64_t TILE_DEPTH = 32;         // bf16 columns of A, or half as many rows of pairs of B
constexpr int64_t TILE_BF16 = LANES * 32;  // elements of a tile
constexpr int64_t TILE_FLOATS = LANES * LANES;
constexpr int64_t TILE_ROW = 64;  // bytes

// Holds the tile registers of this thread; each parallel region must.
class TileSession {
 public:
    TileSession() {
        alignas(64) Config config;
        for (int i = 0; i < 8; i++) config.bytes[i] = TILE_ROW, config.rows[i] = LANES;
        tile::configure(&config);
    }
    TileSession(const TileSession&) = delete;
    ~TileSession() { tile::release(); }

 private:
    struct Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
    static_assert(sizeof(Config) == 64, "as the processor reads it");
};

// M by N tiles of sums in registers 0 .. 3, over which tiles of A and B pass. Four are enough to hide the
// latency of a product; those of fewer tiles are for edges.
template <int M, int N>
struct Block {
    static_assert(M * N <= 4 && (N == 1 || M <= 2), "the other four registers are for A and B");

    static void zero() {
        unrolled<M * N>([](auto i) { tile::zero<i>(); });
    }
    // The sums of (m, n) lie at to + m * row + n * column, each tile in one piece.
    static void load(const float* from, int64_t row, int64_t column) {
        unrolled<M * N>([&](auto i) { load_tile<i>(from, row, column); });
    }
    static void store(float* to, int64_t row, int64_t column) {
        unrolled<M * N>([&](auto i) { store_tile<i>(to, row, column); });
    }
    template <int I>
    static void load_tile(const float* from, int64_t row, int64_t column) {
        tile::load<I>(from + I / N * row + I % N * column, TILE_ROW);
    }
    template <int I>
    static void store_tile(float* to, int64_t row, int64_t column) {
        tile::store<I>(to + I / N * row + I % N * column, TILE_ROW);
    }
    // Add the products of A's tiles at a[m] + a_at, whose rows lie a_row bytes apart, and B's at b[n] + b_at. If A passes
    // through the second-level cache ONCE for a B that stays in the first, it is loaded so.
    template <bool ONCE = false>
    static void multiply(const bf16* const* a, int64_t a_at, int64_t a_row, const bf16* const* b,
                         int64_t b_at) {
        multiply<ONCE>(a, a_at, a_row, b, b_at, [](auto) {});
    }
    // The same, where the sums of tile i are first used for something else: before(i), when its operands are loaded. Stores
    // of finished sums cost nothing there; right behind their last product, they would wait for it.
    template <bool ONCE = false, class Before>
    static void multiply(const bf16* const* a, int64_t a_at, int64_t a_row, const bf16* const* b, int64_t b_at,
                         const Before& before) {
        unrolled<M * N>([&](auto i) {
            constexpr int m = i / N, n = i % N, A = a_register(m), B = b_register(n);
            if constexpr (n == 0) ONCE ? tile::load_once<A>(a[m] + a_at, a_row) : tile::load<A>(a[m] + a_at, a_row);
            if constexpr (m == 0) tile::load<B>(b[n] + b_at, TILE_ROW);
            before(i);
            tile::dot<i, A, B>();
        });
    }

 private:
    // What is used more than once keeps its register.
    static constexpr int a_register(int m) { return N == 1 ? 5 + m % 3 : 4 + m; }
    static constexpr int b_register(int n) { return N == 1 ? 4 : 4 + M + n % (4 - M); }
};
#else
struct TileSession {
    TileSession() {}
};
#endif

}  // namespace mla
