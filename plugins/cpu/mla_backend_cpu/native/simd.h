// Sixteen-lane vectors, and lane-wise operations on them. Written once with the compiler's vector
// extension, so that any target compiles; the instructions that matter are chosen by the target's macros. A
// bf16 value is held as uint16_t, a pair of them as uint32_t (first one low).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define MLA_DOT_BF16 1
#elif defined(__AVX2__)
#include <immintrin.h>
#define MLA_DOT_BF16 0
#else
#define MLA_DOT_BF16 0
#endif

namespace mla {

constexpr int LANES = 16;

// Vectors of BYTES bytes: of floats, of integers of the same size, and of as many bf16.
template <int BYTES>
struct Vectors;
template <>
struct Vectors<16> {
    typedef float F __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint16_t H __attribute__((vector_size(8)));
};
template <>
struct Vectors<32> {
    typedef float F __attribute__((vector_size(32)));
    typedef uint32_t U __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    typedef uint16_t H __attribute__((vector_size(16)));
};
template <>
struct Vectors<64> {
    typedef float F __attribute__((vector_size(64)));
    typedef uint32_t U __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    typedef uint16_t H __attribute__((vector_size(32)));
};
template <class F>
using Like = Vectors<sizeof(F)>;

typedef Vectors<64>::F vf;
typedef Vectors<64>::U vu;
typedef Vectors<64>::I vi;
typedef Vectors<64>::H vh;
typedef uint16_t bf16;

static inline vf splat(float x) {
    return x - vf{};
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
template <class F>
static inline typename Like<F>::H narrow(F x) {
#if MLA_DOT_BF16
    return (typename Like<F>::H)_mm512_cvtneps_pbh((__m512)x);
#else
    typedef typename Like<F>::U U;
    const U bits = (U)x;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(x != x ? quiet : rounded, typename Like<F>::H);
#endif
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// The same of eight, each in 32 bits: left to itself, the compiler takes them apart.
static inline __m256i narrow_words(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan);
    return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}
static inline vh narrow(vf x) {
    __m256 half[2];
    std::memcpy(half, &x, sizeof half);
    const __m256i mixed = _mm256_packus_epi32(narrow_words(half[0]), narrow_words(half[1]));
    return (vh)_mm256_permute4x64_epi64(mixed, 0xd8);
}
#endif
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

template <class H>
static inline auto pair_up(H low, H high) {
    typedef typename Vectors<2 * sizeof(H)>::U U;
    return __builtin_convertvector(low, U) | (__builtin_convertvector(high, U) << 16);
}

// Two numbers of each lane as pairs of bf16.
template <class F>
static inline auto narrow_pairs(F low, F high) {
#if MLA_DOT_BF16
    const __m512i words = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const vu lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vu)_mm512_permutexvar_epi16((__m512i)(lane | (lane + LANES) << 16), words);
#else
    return pair_up(narrow(low), narrow(high));
#endif
}

// Sums of both numbers of pairs, lane by lane.
static inline vf add_pairs(vf sums, vu pairs) {
#if MLA_DOT_BF16
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(0x3f803f80));
#else
    return sums + low_half(pairs) + high_half(pairs);
#endif
}

#if defined(__AVX2__)
// Transpose eight rows of eight words that lie in rows of sixteen.
static inline void transpose_eight(const uint32_t* from, uint32_t* to) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load<__m256i>(from + i * LANES);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        store(to + i * LANES, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
        store(to + (i + 4) * LANES, _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
}
#endif

// Transpose sixteen rows of sixteen words: squares of 1, 2, 4 and 8 words are swapped across the diagonal.
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
#elif defined(__AVX2__)
    const uint32_t* words = (const uint32_t*)from;
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < LANES; j += 8) transpose_eight(words + i * LANES + j, to + j * LANES + i);
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j * LANES + i] = from[i][j];
#endif
}

static inline bool any_above(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
    bool any = false;
    for (int i = 0; i < LANES; i++) any |= a[i] > b[i];
    return any;
#endif
}
static inline bool same(vf x, float value) {
    bool same = true;
    for (int i = 0; i < LANES; i++) same &= x[i] == value;
    return same;
}

template <class F>
static inline F maximum(F a, F b) {
    return a > b ? a : b;
}
#if defined(__AVX512F__)
static inline vf maximum(vf a, vf b) {  // in one instruction, with the same result for a NaN
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
}
// x times 2^power, rounded down to a whole number; a NaN stays one.
static inline vf times_power(vf x, vf power) {
    return (vf)_mm512_scalef_ps((__m512)x, (__m512)power);
}
#endif

template <class F>
static inline F times_power(F x, F power) {
    typedef typename Like<F>::I I;
    const float magic = 12582912.0f;  // 1.5 * 2^23, whose sum with a whole number has that as its last bits
    return x != x ? x : (F)((I)x + (((I)(power + magic) - (I)(F{} + magic)) << 23));
}

// e^x for x up to 8 (softening.h), relative error below 3e-7 near 0; values below -87 count as -87.
template <class F>
static inline F exponential(F x) {
    x = maximum(F{} - 87.0f, x);  // a NaN stays
    F scaled = x * 1.44269504f;
    const float magic = 12582912.0f;  // adding it rounds to the nearest integer
    const F whole = (scaled + magic) - magic, rest = scaled - whole;  // in [-0.5, 0.5]; 2^rest by its Taylor series
    F p = F{} + 1.5403530e-4f;
    p = p * rest + 1.3333558e-3f;
    p = p * rest + 9.6181291e-3f;
    p = p * rest + 5.5504109e-2f;
    p = p * rest + 2.4022651e-1f;
    p = p * rest + 6.9314718e-1f;
    p = p * rest + 1.0f;
    return times_power(p, whole);
}

// 2^x, relative error below 2e-7, but not exactly 1 for 0; a NaN stays. The polynomial is the best one on [0, 1) of its degree.
static inline vf two_to(vf x) {
#if defined(__AVX512DQ__)
    const vf rest = (vf)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x); 0 for -inf
    vf p = vf{} + 1.8775767e-3f;
    p = p * rest + 8.9893397e-3f;
    p = p * rest + 5.5826318e-2f;
    p = p * rest + 2.4015361e-1f;
    p = p * rest + 6.9315308e-1f;
    return times_power(p * rest + 0.99999994f, x);  // which takes floor(x)
#else
    return x == splat(-INFINITY) ? vf{} : exponential(x * 0.69314718f);
#endif
}

template <class F, int... I>
static inline void unrolled(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
// Call f(0), .., f(N - 1) with arguments that are constants.
template <int N, class F>
static inline void unrolled(F&& f) {
    unrolled(f, std::make_integer_sequence<int, N>());
}

}  // namespace mla
