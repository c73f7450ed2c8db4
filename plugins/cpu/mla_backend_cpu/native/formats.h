// Rows of a cache that stores codes and scales: how a row is encoded, and how it is decoded. A format is a
// list of runs, so that attention and the cache write know no format by name.
//
// Every code has at most eight significant bits, so bf16 holds it exactly. Products of bf16 are made of
// codes, and scales are applied to sums and weights in fp32: nothing is rounded that a plain cache would not
// round.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "accumulators.h"

namespace mla {

// How the columns of a run are stored; the scale of a code is in fp32 where nothing else is said.
enum Kind : int64_t {
    PLAIN,        // bf16, without a scale
    E4M3_FIXED,   // e4m3 over the scale of the layout, which no row holds
    E4M3_POWER,   // ... over a power of two: 2^ceil(log2(max(largest / 448, 1e-4)))
    E4M3_ANY,     // ... over largest / 448
    INT8,         // int8 over largest / 127, halves rounded to even
    INT8_BLOCKS,  // the same as ggml does it: times the inverse, halves rounded away from 0, the scale in
                  // fp16
};

// Columns of a row that follow each other, and share a scale: a multiple of 32 but in the last run, where
// their number is even.
struct Run {
    int64_t columns, kind;
    int64_t codes, scale;  // the byte of the first code, and that of the scale
};

// A row of the cache. A plain one has no runs, and holds nothing but bf16.
struct Layout {
    const Run* runs;
    int64_t count, bytes;  // of a row
    float fixed;           // the scale of E4M3_FIXED

    const Run* begin() const { return runs; }
    const Run* end() const { return runs + count; }
};

// ---------------------------------------------------------------------------------------------- numbers

static inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t size = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    if (size < 0x400) return (sign ? -1.0f : 1.0f) * (float)size * 0x1p-24f;
    uint32_t bits = sign | ((size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}
// Of a number that is not negative; what is too large becomes the largest one.
static inline uint16_t float_to_half(float x) {
    x = std::min(x, 65504.0f);
    uint32_t bits;
    if (x < 0x1p-14f) {
        x += 0.5f;  // which rounds to multiples of 2^-24
        std::memcpy(&bits, &x, 4);
        return (uint16_t)(bits - 0x3f000000u);
    }
    std::memcpy(&bits, &x, 4);
    return (uint16_t)(((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112u << 10));
}

// PART codes in fp32; the code of a NaN gives some number.
static inline pf e4m3_part(const uint8_t* from) {
#if defined(__AVX512F__)
    // As fp16, the exponent is too small by 8; conversions take denormals for what they are, whatever the
    // mode.
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load<__m128i>(from)), 7);
    return (pf)_mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16((int16_t)0xbf80))) * 256.0f;
#elif defined(__AVX2__)
    const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)from)), 7);
    return (pf)_mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16((int16_t)0xbf80))) * 256.0f;
#else
    pu codes;
    for (int i = 0; i < PART; i++) codes[i] = from[i];
    const pu size = codes & 0x7f;
    const pf normal = (pf)((size << 20) + (120u << 23));
    const pf value = size < 8u ? 2 * (normal - 0x1p-7f) : normal;  // not by denormals, which may count as 0
    return (pf)((pu)value | ((codes & 0x80) << 24));
#endif
}
static inline pf int8_part(const uint8_t* from) {
#if defined(__AVX512F__)
    return (pf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
    return (pf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    pf value;
    for (int i = 0; i < PART; i++) value[i] = (int8_t)from[i];
    return value;
#endif
}

static inline void put(float* to, pf value, float scale) {
    store(to, value * scale);
}
static inline void put(bf16* to, pf value, float) {
    store(to, narrow(value));
}

// Decode `count` codes: times their scale to fp32, or as they are to bf16.
template <pf (*READ)(const uint8_t*), class T>
static inline void decode_codes(const uint8_t* from, int64_t count, float scale, T* to) {
    int64_t k = 0;
    for (; k + PART <= count; k += PART) put(to + k, READ(from + k), scale);
    if (k == count) return;
    uint8_t last[PART] = {};
    T some[PART];
    std::memcpy(last, from + k, count - k);
    put(some, READ(last), scale);
    std::memcpy(to + k, some, (count - k) * sizeof(T));
}

static inline void put_nan(float* to) {
    *to = NAN;
}
static inline void put_nan(bf16* to) {
    *to = 0x7fc0;
}
template <class T>
static inline void decode_nans(const uint8_t* from, int64_t count, T* to) {
    uint8_t met = 0;
    for (int64_t k = 0; k < count; k++) met |= (uint8_t)((from[k] & 0x7f) == 0x7f);
    if (!met) return;
    for (int64_t k = 0; k < count; k++)
        if ((from[k] & 0x7f) == 0x7f) put_nan(to + k);
}

// ---------------------------------------------------------------------------------------------- decode

static inline float scale_of(const Layout& layout, const Run& run, const uint8_t* row) {
    if (run.kind == PLAIN) return 1;
    if (run.kind == E4M3_FIXED) return layout.fixed;
    if (run.kind == INT8_BLOCKS) return half_to_float(load<uint16_t>(row + run.scale));
    return load<float>(row + run.scale);
}

// The scales of `count` rows, up to sixteen; zeros behind them.
static inline void scales_of(const Layout& layout, const Run& run, const uint8_t* const* rows, int64_t count,
                             float* to) {
    if (run.kind == INT8_BLOCKS && count == LANES) {
        uint16_t half[LANES];
        for (int64_t j = 0; j < LANES; j++) half[j] = load<uint16_t>(rows[j] + run.scale);
#if defined(__AVX512F__)
        store(to, _mm512_cvtph_ps(load<__m256i>(half)));
#else
        for (int64_t j = 0; j < LANES; j++) to[j] = half_to_float(half[j]);
#endif
        return;
    }
    for (int64_t j = 0; j < LANES; j++) to[j] = j < count ? scale_of(layout, run, rows[j]) : 0;
}

// Decode the columns of a run to fp32.
static inline void decode_run(const Layout& layout, const Run& run, const uint8_t* row, float* to) {
    const uint8_t* from = row + run.codes;
    const float scale = scale_of(layout, run, row);
    if (run.kind == PLAIN) {
        for (int64_t k = 0; k < run.columns; k++) to[k] = widen(load<bf16>(from + 2 * k));
    } else if (run.kind >= INT8) {
        decode_codes<int8_part>(from, run.columns, scale, to);
    } else {
        decode_codes<e4m3_part>(from, run.columns, scale, to);
        decode_nans(from, run.columns, to);
    }
}

// ---------------------------------------------------------------------------------------------- encode

// The largest size of some numbers: a NaN is left out, and infinity is the largest finite one.
static inline float largest(const bf16* row, int64_t columns) {
    vf most = {};
    for (int64_t k = 0; k < columns; k += LANES) {
        const vf size = as_float((vu)widen(load<vh>(row + k)) & 0x7fffffffu);
        most = maximum(size, most);  // which a NaN does not pass
    }
    float top = 0;
    for (int i = 0; i < LANES; i++) top = std::max(top, most[i]);
    return std::min(top, FLT_MAX);
}
static inline float power_above(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fffff) & ~0x7fffffu;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Round to e4m3, nearest even; what is too large becomes the largest one.
static inline vu to_e4m3(vf x) {
    const vu sign = ((vu)x >> 24) & 0x80;
    vf size = as_float((vu)x & 0x7fffffffu);
    size = size > 448.0f ? splat(448) : size;
    const vu bits = (vu)size, normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120u << 3);
    const vu small = (vu)(size + 0x1p14f) - (vu)splat(0x1p14f);  // in multiples of 2^-9
    const vu code = size < 0x1p-6f ? small : normal;
    return (size != size ? vu{} + 0x7f : code) | sign;
}
// Round halves to even, or away from 0; a NaN is 0.
static inline vi to_int8(vf x, bool away) {
    x = x > 127.0f ? splat(127) : x < -127.0f ? splat(-127) : x == x ? x : splat(0);
    const vi whole = __builtin_convertvector(x, vi);
    const vf rest = x - __builtin_convertvector(whole, vf);
    const vi odd = whole & 1;
    const vi up = (rest > 0.5f) | ((rest == 0.5f) & (away ? vi{} - 1 : odd != 0));
    const vi down = (rest < -0.5f) | ((rest == -0.5f) & (away ? vi{} - 1 : odd != 0));
    return whole - up + down;  // a mask of what is true is -1
}

typedef uint8_t Codes __attribute__((vector_size(LANES)));

// Encode `run.columns` numbers, a multiple of sixteen.
static inline void encode_run(const Layout& layout, const Run& run, const bf16* from, uint8_t* row) {
    uint8_t* to = row + run.codes;
    if (run.kind == PLAIN) {
        for (int64_t k = 0; k < run.columns; k++) {  // infinity becomes the largest number
            const bf16 value = from[k], code = (value & 0x7fff) == 0x7f80 ? value - 1 : value;
            store(to + 2 * k, code);
        }
        return;
    }
    const float most = largest(from, run.columns), ratio = most / (run.kind >= INT8 ? 127.0f : 448.0f);
    const float scale = run.kind == E4M3_FIXED    ? layout.fixed
                        : run.kind == E4M3_POWER  ? power_above(std::max(ratio, 1e-4f))
                        : run.kind == INT8_BLOCKS ? ratio
                                                  : std::max(ratio, FLT_MIN);
    const float inverse = scale > 0 ? 1 / scale : 0;
    for (int64_t k = 0; k < run.columns; k += LANES) {
        const vf x = widen(load<vh>(from + k)), part = run.kind == INT8_BLOCKS ? x * inverse : x / scale;
        const vu code = run.kind >= INT8 ? (vu)to_int8(part, run.kind == INT8_BLOCKS) : to_e4m3(part);
        store(to + k, __builtin_convertvector(code, Codes));
    }
    if (run.kind == INT8_BLOCKS)
        store(row + run.scale, float_to_half(scale));
    else if (run.kind != E4M3_FIXED)
        store(row + run.scale, scale);
}

}  // namespace mla
