// Sixteen sums, and sixteen pairs to multiply, in vectors as wide as the target's own. The compiler passes
// wider ones through memory, which an inner loop cannot afford; vf and vu are for everything else.
#pragma once
#include "simd.h"

namespace mla {

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int PARTS = 64 / WIDTH;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int PART = LANES / PARTS;  // lanes of a part
typedef Vectors<WIDTH>::F pf;
typedef Vectors<WIDTH>::U pu;
typedef Vectors<WIDTH>::H ph;

struct Sum16 {
    pf part[PARTS];
};
struct Pair16 {
    pu part[PARTS];
};

static inline Sum16 load_sum16(const float* from) {
    return load<Sum16>(from);
}
static inline Pair16 load_pair16(const void* from) {
    return load<Pair16>((const uint32_t*)from);
}
static inline vf whole(const Sum16& sums) {
    return load<vf>(&sums);
}
static inline void scale(Sum16& sums, float factor) {
    for (int p = 0; p < PARTS; p++) sums.part[p] *= factor;
}

// a b + sum, rounded once where the target can: left to itself, the compiler prefers two instructions in some
// loops.
static inline pf multiply_add(pf a, float b, pf sum) {
#if defined(__AVX512F__)
    return (pf)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)sum);
#elif defined(__FMA__)
    return (pf)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)sum);
#else
    return a * b + sum;
#endif
}

// The two halves of a part's pairs, in fp32.
static inline pf low_part(pu pairs) {
    return (pf)(pairs << 16);
}
static inline pf high_part(pu pairs) {
    return (pf)(pairs & 0xffff0000u);
}

#if MLA_DOT_BF16
// sums += b.low * a.low + b.high * a.high, lane by lane; a is one pair for all lanes.
static inline void add_products(Sum16& sums, const Pair16& b, uint32_t a) {
    sums.part[0] =
        (pf)_mm512_dpbf16_ps((__m512)sums.part[0], (__m512bh)b.part[0], (__m512bh)_mm512_set1_epi32((int)a));
}
#endif

// 32 columns of two rows as pairs. Where the target shuffles only within 128-bit groups, the columns come in
// another order, which `store_unzipped` undoes.
struct Zipped {
    Pair16 first, second;
};
static inline Zipped zip(const bf16* a, const bf16* b) {
    Zipped to;
    for (int p = 0; p < PARTS; p++) {
#if defined(__AVX512BW__)
        const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
        to.first.part[p] = (pu)_mm512_unpacklo_epi16(x, y);
        to.second.part[p] = (pu)_mm512_unpackhi_epi16(x, y);
#elif defined(__AVX2__)
        const __m256i x = load<__m256i>(a + 2 * p * PART), y = load<__m256i>(b + 2 * p * PART);
        to.first.part[p] = (pu)_mm256_unpacklo_epi16(x, y);
        to.second.part[p] = (pu)_mm256_unpackhi_epi16(x, y);
#else
        const auto pairs = [&](int64_t c) {
            return __builtin_convertvector(load<ph>(a + c), pu) |
                   (__builtin_convertvector(load<ph>(b + c), pu) << 16);
        };
        to.first.part[p] = pairs(p * PART), to.second.part[p] = pairs(LANES + p * PART);
#endif
    }
    return to;
}
// Store 32 results of zipped columns as bf16, in their original order.
static inline void store_unzipped(bf16* to, vf first, vf second) {
#if defined(__AVX512BW__)
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    store(to, narrow((vf)_mm512_permutex2var_ps((__m512)first, low, (__m512)second)));
    store(to + 16, narrow((vf)_mm512_permutex2var_ps((__m512)first, high, (__m512)second)));
#elif defined(__AVX2__)
    float plain[2 * LANES];
    for (int i = 0; i < LANES; i++) {
        plain[i / 4 * 8 + i % 4] = first[i];
        plain[i / 4 * 8 + 4 + i % 4] = second[i];
    }
    store(to, narrow(load<vf>(plain)));
    store(to + LANES, narrow(load<vf>(plain + LANES)));
#else
    store(to, narrow(first));
    store(to + LANES, narrow(second));
#endif
}

}  // namespace mla
