// What the AMX instructions in tiles.h do, in plain C++, for tests on machines without them. Misuse that the
// processor answers with a fault, or with garbage, ends the program with a message.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace mla {
namespace tile {

constexpr int TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;

struct State {
    bool configured = false;
    uint8_t rows[TILES];
    uint16_t bytes[TILES];  // of a row
    alignas(64) uint8_t data[TILES][MOST_ROWS][MOST_BYTES];
};

static inline State& state() {
    static thread_local State state;
    return state;
}

static inline void require(bool right, const char* rule) {
    if (right) return;
    std::fprintf(stderr, "tile emulation: %s\n", rule);
    std::abort();
}

// palette, start row, 14 reserved, 16 x bytes of a row (uint16), 16 x rows
static inline void configure(const void* config) {
    const uint8_t* from = (const uint8_t*)config;
    State& s = state();
    require(!s.configured, "configured again before it was released");
    require(from[0] == 1, "there is no such palette");
    for (int i = 1; i < 16; i++) require(from[i] == 0, "start row and reserved bytes must be zero");
    for (int i = 0; i < 16; i++) {
        uint16_t bytes;
        std::memcpy(&bytes, from + 16 + 2 * i, 2);
        const uint8_t rows = from[48 + i];
        require(i < TILES || (!bytes && !rows), "there are eight tiles");
        require(bytes <= MOST_BYTES, "a row has at most 64 bytes");
        require(rows <= MOST_ROWS, "a tile has at most 16 rows");
        require(!bytes == !rows, "a tile has both rows and bytes, or neither");
        if (i < TILES) s.bytes[i] = bytes, s.rows[i] = rows;
    }
    std::memset(s.data, 0, sizeof s.data);
    s.configured = true;
}
static inline void release() {
    state().configured = false;
}

template <int T>
static inline State& configured() {
    static_assert(T >= 0 && T < TILES, "there are eight tiles");
    State& s = state();
    require(s.configured, "used before it was configured");
    require(s.rows[T], "a tile that was not configured is used");
    return s;
}

template <int T>
static inline void zero() {
    std::memset(configured<T>().data[T], 0, sizeof state().data[T]);
}
template <int T>
static inline void load(const void* from, int64_t stride) {
    State& s = configured<T>();
    std::memset(s.data[T], 0, sizeof s.data[T]);
    for (int r = 0; r < s.rows[T]; r++) std::memcpy(s.data[T][r], (const char*)from + r * stride, s.bytes[T]);
}
template <int T>
static inline void load_once(const void* from, int64_t stride) {
    load<T>(from, stride);
}
template <int T>
static inline void store(void* to, int64_t stride) {
    const State& s = configured<T>();
    for (int r = 0; r < s.rows[T]; r++) std::memcpy((char*)to + r * stride, s.data[T][r], s.bytes[T]);
}

// Denormal numbers count as zero, before and after.
static inline vf flush(vf x) {
    const vu bits = (vu)x;
    return (vf)((bits & 0x7fffffffu) < 0x00800000u ? bits & 0x80000000u : bits);
}
static inline vf fused(vf a, vf b, vf sum) {
    for (int i = 0; i < LANES; i++) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
    return flush(sum);
}

// The first and the second values of all pairs are summed apart, then together, and then added to C; every
// step rounds to nearest even.
template <int C, int A, int B>
static inline void dot() {
    static_assert(C != A && C != B && A != B, "three different tiles");
    State& s = configured<C>();
    configured<A>(), configured<B>();
    require(s.bytes[A] % 4 == 0 && s.bytes[A] / 4 == s.rows[B], "A has no column pair for every row of B");
    require(s.rows[A] == s.rows[C], "A and C differ in rows");
    require(s.bytes[B] == s.bytes[C] && s.bytes[C] % 4 == 0, "B and C differ in columns");
    for (int m = 0; m < s.rows[C]; m++) {
        vf first = {}, second = {};
        for (int k = 0; k < s.rows[B]; k++) {
            uint32_t a;
            std::memcpy(&a, s.data[A][m] + 4 * k, 4);
            const vu b = mla::load<vu>(s.data[B][k]);
            first = fused(flush(low_half(b)), flush(splat(widen((bf16)a))), first);
            second = fused(flush(high_half(b)), flush(splat(widen((bf16)(a >> 16)))), second);
        }
        const vf sum = flush(mla::load<vf>(s.data[C][m])) + flush(first + second);
        const vf rounded = flush(sum);
        std::memset(s.data[C][m], 0, MOST_BYTES);
        std::memcpy(s.data[C][m], &rounded, s.bytes[C]);
    }
}

}  // namespace tile
}  // namespace mla
