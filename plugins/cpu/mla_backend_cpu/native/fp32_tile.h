// Products in fp32, one register tile at a time: C += A B, with some rows of A, whose numbers are broadcast
// one by one, and strips of sixteen columns of B, which are vectors. Operands are fp32 already, in memory
// that the first caches hold.
#pragma once
#include <utility>

#include "accumulators.h"

namespace mla {

// Rows of a tile: beside the sums, the registers hold a strip or two of B, and a number of A.
constexpr int TILE_STRIPS = WIDTH == 64 ? 2 : 1;
constexpr int TILE_ROWS = (REGISTERS - 4) / (TILE_STRIPS * PARTS) / 3 * 3;

// Where the numbers of A lie: row by row, or those of one k next to each other.
struct RowMajor {
    const float* base;
    int64_t row;

    float at(int i, int64_t k) const { return base[i * row + k]; }
};
template <int STEP>
struct Interleaved {
    const float* base;

    float at(int i, int64_t k) const { return base[k * STEP + i]; }
};

// Rows of sixteen columns of B; strips lie `strip` apart.
struct Strips {
    const float* base;
    int64_t row, strip;
};
// Rows of sums, strips next to each other. Fresh ones start at zero.
struct Sums {
    float* base;
    int64_t row;
    bool fresh;
};

// The sums of MR rows and NP strips.
template <int MR, int NP>
struct Tile {
    static constexpr int VECTORS = NP * PARTS;
    pf sum[MR][VECTORS];

    void open(const Sums& c) {
#pragma GCC unroll 32
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++)
                sum[i][v] = c.fresh ? pf{} : load<pf>(c.base + i * c.row + v * PART);
    }
    // `column`: COUNT vectors of B from `first` on.
    template <class A, int COUNT>
    void add(const A& a, int64_t k, const pf (&column)[COUNT], int first = 0) {
#pragma GCC unroll 32
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
            for (int v = 0; v < COUNT; v++)
                sum[i][first + v] = multiply_add(column[v], a.at(i, k), sum[i][first + v]);
    }
    // Of two k, row by row.
    template <class A, int COUNT>
    void add(const A& a, int64_t k, const pf (&low)[COUNT], const pf (&high)[COUNT], int first) {
#pragma GCC unroll 32
        for (int i = 0; i < MR; i++) {
#pragma GCC unroll 16
            for (int v = 0; v < COUNT; v++)
                sum[i][first + v] = multiply_add(low[v], a.at(i, k), sum[i][first + v]);
#pragma GCC unroll 16
            for (int v = 0; v < COUNT; v++)
                sum[i][first + v] = multiply_add(high[v], a.at(i, k + 1), sum[i][first + v]);
        }
    }
    void close(const Sums& c) const {
#pragma GCC unroll 32
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) store(c.base + i * c.row + v * PART, sum[i][v]);
    }
};

// Memory that is needed next, fetched to the second-level cache, `step` bytes of each strip with every k.
struct Ahead {
    const char* at;  // or null: nothing is fetched
    int64_t step, strip;
};

template <int MR, int NP, bool FETCHES, class A>
static void add_tile(const A& a, const Strips& b, const Sums& c, int64_t depth, Ahead ahead) {
    Tile<MR, NP> tile;
    tile.open(c);
    const float* at = b.base;
    for (int64_t k = 0; k < depth; k++, at += b.row, ahead.at += ahead.step) {
#pragma GCC unroll 8
        for (int n = 0; n < (FETCHES ? NP : 0); n++) __builtin_prefetch(ahead.at + n * ahead.strip, 0, 2);
        pf column[tile.VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < tile.VECTORS; v++)
            column[v] = load<pf>(at + v / PARTS * b.strip + v % PARTS * PART);
        tile.add(a, k, column);
    }
    tile.close(c);
}

// The same with B in bf16 pairs of two k, as panels hold them, which are widened in registers. Where it KEEPS
// these, they are stored as strips `kept` for other rows.
template <int MR, int NP, bool FETCHES, bool KEEPS, class A>
static void add_pairs_tile(const A& a, const bf16* b, int64_t strip, const Sums& c, int64_t depth,
                           Ahead ahead, float* kept, int64_t kept_strip) {
    Tile<MR, NP> tile;
    // All vectors of two k at once if the registers hold them beside the sums, else one vector after another.
    constexpr int TOGETHER = (MR + 2) * tile.VECTORS + 2 <= REGISTERS ? tile.VECTORS : 1;
    tile.open(c);
    for (int64_t k = 0; k < depth; k += 2, b += 2 * LANES, ahead.at += 2 * ahead.step) {
#pragma GCC unroll 8
        for (int n = 0; n < (FETCHES ? NP : 0); n++) __builtin_prefetch(ahead.at + n * ahead.strip, 0, 2);
#pragma GCC unroll 16
        for (int first = 0; first < tile.VECTORS; first += TOGETHER) {
            pf low[TOGETHER], high[TOGETHER];
#pragma GCC unroll 16
            for (int i = 0; i < TOGETHER; i++) {
                const int v = first + i;
                const pu pairs = load<pu>(b + v / PARTS * strip + v % PARTS * 2 * PART);
                low[i] = low_part(pairs), high[i] = high_part(pairs);
                if (!KEEPS) continue;
                float* const to = kept + v / PARTS * kept_strip + k * LANES + v % PARTS * PART;
                store(to, low[i]);
                store(to + LANES, high[i]);
            }
            tile.add(a, k, low, high, first);
        }
    }
    tile.close(c);
}

}  // namespace mla
