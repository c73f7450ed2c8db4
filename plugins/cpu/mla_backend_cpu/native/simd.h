// Sixteen-lane vectors and the one primitive everything is built on: a dot product of bf16 pairs.
//
// Written once with the compiler's vector extension, so that any target compiles; the instructions that
// matter are chosen by the target's macros. A bf16 value is held as uint16_t, a pair of them as uint32_t
// (first one low).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define MLA_DOT_BF16 1
#elif defined(__AVX512BW__)
#include <immintrin.h>
#define MLA_DOT_BF16 0
#else
#define MLA_DOT_BF16 0
#endif

namespace mla {

constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint16_t bf16;

static inline vf splat(float x) {
    return x - vf{};
}
static inline vi splat_int(int32_t x) {
    return x - vi{};
}
static inline vf as_float(vu x) {
    return (vf)x;
}

template <class V, class T>
static inline V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}
template <class V, class T>
static inline void store(T* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline vf widen(vh x) {
    return as_float(__builtin_convertvector(x, vu) << 16);
}

// Round to nearest even; a NaN stays one.
static inline vh narrow(vf x) {
#if MLA_DOT_BF16
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(x != x ? quiet : rounded, vh);
#endif
}
static inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The two halves of sixteen pairs, in fp32.
static inline vf low_half(vu pairs) {
    return as_float(pairs << 16);
}
static inline vf high_half(vu pairs) {
    return as_float(pairs & 0xffff0000u);
}

// sum += b.low * a.low + b.high * a.high, lane by lane; a is one pair for all lanes.
static inline vf dot(vf sum, vu b, uint32_t a) {
#if MLA_DOT_BF16
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32((int)a));
#else
    sum += low_half(b) * widen((bf16)a);
    sum += high_half(b) * widen((bf16)(a >> 16));
    return sum;
#endif
}

static inline vu pair_up(vh low, vh high) {
    return __builtin_convertvector(low, vu) | (__builtin_convertvector(high, vu) << 16);
}

// 32 columns of two rows as pairs, in two vectors. Where the machine shuffles only within 128-bit groups, the
// columns come in the order of `column_order`, which `unzipped` undoes.
struct Zipped {
    vu first, second;
};
static inline Zipped zip(const bf16* a, const bf16* b) {
#if defined(__AVX512BW__)
    __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    return {(vu)_mm512_unpacklo_epi16(x, y), (vu)_mm512_unpackhi_epi16(x, y)};
#else
    return {pair_up(load<vh>(a), load<vh>(b)), pair_up(load<vh>(a + 16), load<vh>(b + 16))};
#endif
}
// Store 32 results of zipped columns as bf16, in plain order.
static inline void store_unzipped(bf16* to, vf first, vf second) {
#if defined(__AVX512BW__)
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    store(to, narrow((vf)_mm512_permutex2var_ps((__m512)first, low, (__m512)second)));
    store(to + 16, narrow((vf)_mm512_permutex2var_ps((__m512)first, high, (__m512)second)));
#else
    store(to, narrow(first));
    store(to + 16, narrow(second));
#endif
}

// Transpose sixteen rows of sixteen words: squares of 1, 2, 4 and 8 words change places across the diagonal.
static inline void transpose(const vu* from, uint32_t* to) {
#if defined(__AVX512F__)
    __m512i rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = (__m512i)from[i];
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int size = 1; size < LANES; size *= 2) {
        const vi upper = (lane & size) != 0, moved = lane ^ size;
        const __m512i low = (__m512i)(upper ? moved + LANES : lane);
        const __m512i high = (__m512i)(upper ? lane + LANES : moved);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & size) continue;
            const __m512i a = rows[i], b = rows[i + size];
            rows[i] = _mm512_permutex2var_epi32(a, low, b);
            rows[i + size] = _mm512_permutex2var_epi32(a, high, b);
        }
    }
    for (int i = 0; i < LANES; i++) store(to + i * LANES, rows[i]);
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j * LANES + i] = from[i][j];
#endif
}

static inline bool same(vf x, float value) {
    bool same = true;
    for (int i = 0; i < LANES; i++) same &= x[i] == value;
    return same;
}

static inline vf maximum(vf a, vf b) {
    return a > b ? a : b;
}

// e^x for x <= 0, relative error below 3e-7; what is below -87 counts as -87.
static inline vf exponential(vf x) {
    x = x < -87.0f ? splat(-87.0f) : x;  // a NaN fails the comparison and stays
    vf scaled = x * 1.44269504f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    vf shifted = scaled + magic;
    vi whole = (vi)shifted - (vi)splat(magic);
    vf rest = scaled - (shifted - magic);  // in [-0.5, 0.5]; 2^rest by its Taylor series
    vf p = splat(1.5403530e-4f);
    p = p * rest + 1.3333558e-3f;
    p = p * rest + 9.6181291e-3f;
    p = p * rest + 5.5504109e-2f;
    p = p * rest + 2.4022651e-1f;
    p = p * rest + 6.9314718e-1f;
    p = p * rest + 1.0f;
    return x != x ? x : (vf)((vi)p + (whole << 23));
}

}  // namespace mla
