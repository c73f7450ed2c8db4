// Codes of some rows of the cache, as they are, in bf16.
#pragma once
#include "formats.h"

namespace mla {

constexpr int64_t PIECE = 32;  // columns between gaps, if there are any

// Columns whose codes, of one byte, are decoded alike, whatever their scales, and lie next to each other, or
// in pieces at one distance.
struct Stretch {
    int64_t kind, column, columns, codes;
    int64_t gap = 0;  // bytes between pieces

    // Take the next run in, if its codes follow.
    bool extended_by(const Run& run) {
        const int64_t skipped = run.codes - codes - columns;
        if (columns == PIECE && run.columns == PIECE && skipped > 0) gap = skipped;
        const bool follows = run.kind == kind && skipped == gap * (columns / PIECE);
        if (follows) columns += run.columns;
        return follows;
    }
    // The byte of a code, of the first one of a piece where there are gaps.
    int64_t at(int64_t column) const { return codes + column + column / PIECE * gap; }
};

#if MLA_DOT_BF16
// bf16 of a number that is `size` times 2^-9.
static constexpr uint32_t bf16_of(uint32_t size) {
    uint32_t top = 0;
    for (uint32_t rest = size; rest > 1; rest /= 2) top++;
    return size ? ((118 + top) << 7) | ((size << 7 >> top) & 0x7f) : 0;
}
// The bytes of bf16 of codes without their signs.
struct Bytes {
    alignas(64) uint8_t high[128] = {}, low[128] = {};

    constexpr explicit Bytes(bool whole) {
        for (uint32_t code = 0; code < 128; code++) {
            const uint32_t exponent = code / 8, rest = code % 8;
            uint32_t value = bf16_of(exponent ? (8 + rest) << (exponent - 1) : rest);
            if (code == 127) value = 0x7fc0;
            if (whole) value = bf16_of(code << 9);
            high[code] = (uint8_t)(value >> 8), low[code] = (uint8_t)value;
        }
    }
};
static constexpr Bytes E4M3_BYTES(false), INT8_BYTES(true);

static inline __m512i two_pieces(const uint8_t* from, int64_t distance) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load<__m256i>(from)), load<__m256i>(from + distance), 1);
}

// Decode 64 codes at a time, by tables that two registers hold; returns how many columns are decoded. The
// tables lack -128, which nobody writes: a row that has it is left to `decode_codes`.
template <bool WHOLE>
[[gnu::target("avx512vbmi")]] static int64_t by_tables(const uint8_t* const* rows, int64_t count,
                                                       const Stretch& part, bf16* to, int64_t pitch) {
    const Bytes& bytes = WHOLE ? INT8_BYTES : E4M3_BYTES;
    const __m512i high0 = load<__m512i>(bytes.high), high1 = load<__m512i>(bytes.high + 64);
    const __m512i low0 = load<__m512i>(bytes.low), low1 = load<__m512i>(bytes.low + 64);
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // undone by interleaving in groups
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    const int64_t columns = part.columns / 64 * 64;
    for (int64_t j = 0; j < count; j++, to += pitch) {
        __mmask64 least = 0;
        for (int64_t k = 0; k < columns; k += 64) {
            const __m512i codes =
                _mm512_permutexvar_epi64(order, two_pieces(rows[j] + part.at(k), PIECE + part.gap));
            if (WHOLE) least |= _mm512_cmpeq_epi8_mask(codes, sign);
            const __m512i index = WHOLE ? _mm512_abs_epi8(codes) : codes;
            const __m512i low = _mm512_permutex2var_epi8(low0, index, low1);
            const __m512i size = _mm512_permutex2var_epi8(high0, index, high1);
            const __m512i high = _mm512_ternarylogic_epi64(size, codes, sign, 0xf8);  // size | (codes & sign)
            store(to + k, _mm512_unpacklo_epi8(low, high));
            store(to + k + 32, _mm512_unpackhi_epi8(low, high));
        }
        for (int64_t k = 0; least && k < columns; k += PIECE)
            decode_codes<int8_part>(rows[j] + part.at(k), PIECE, 1, to + k);
    }
    return columns;
}
static int64_t by_tables(const uint8_t* const* rows, int64_t count, const Stretch& part, bf16* to,
                         int64_t pitch) {
    static const bool known = __builtin_cpu_supports("avx512vbmi");
    if (!known || part.kind == PLAIN) return 0;
    return (part.kind >= INT8 ? by_tables<true> : by_tables<false>)(rows, count, part, to, pitch);
}
#else
static int64_t by_tables(const uint8_t* const*, int64_t, const Stretch&, bf16*, int64_t) {
    return 0;
}
#endif

// Decode the same columns of `count` rows to rows that lie `pitch` apart.
static void decode_stretch(const uint8_t* const* rows, int64_t count, const Stretch& part, bf16* to,
                           int64_t pitch) {
    to += part.column;
    const bool plain = part.kind == PLAIN, whole = part.kind >= INT8;
    const int64_t done = by_tables(rows, count, part, to, pitch);
    for (int64_t c = done, piece; c < part.columns; c += piece) {
        piece = part.gap ? PIECE : part.columns - c;
        for (int64_t j = 0; j < count; j++) {
            const uint8_t* from = rows[j] + part.at(c);
            bf16* const row = to + j * pitch + c;
            if (plain) {
                std::memcpy(row, from, piece * sizeof(bf16));
            } else if (whole) {
                decode_codes<int8_part>(from, piece, 1, row);
            } else {
                decode_codes<e4m3_part>(from, piece, 1, row);
                decode_nans(from, piece, row);
            }
        }
    }
}

}  // namespace mla
