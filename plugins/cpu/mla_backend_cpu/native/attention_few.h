// Attention of up to FEW query rows with products of pairs: sixteen rows as the lanes of a vector would
// mostly be empty, so the lanes are columns here. A score is a dot product along a key, summed up at its end.
#pragma once

#include "attention.h"
#include "gathered.h"

namespace mla {

constexpr int FEW = 8;
constexpr int64_t BLOCK = 2 * LANES;  // columns that are zipped together

// Scores [16][16] of R rows with sixteen keys from `first` on in their block; other lanes stay as they
// are. K keys at once share what is loaded of queries.
template <int R, int K>
static void few_scores(const Row* rows, const bf16* key, int64_t pitch, const Span* span, int64_t spans,
                       int64_t first, float* to, Lines& next) {
    for (int64_t i = 0; i < LANES; i += K) {
        __m512 total[K][R] = {};
        for (int64_t s = 0; s < spans; s++) {
            __m512 sum[K][R] = {};
            const int64_t end = span[s].column + span[s].columns;
            for (int64_t k = span[s].column; k < end; k += BLOCK) {
                const __mmask32 some = end - k < BLOCK ? (1u << (end - k)) - 1 : ~0u;
                __m512bh q[R];
                for (int r = 0; r < R; r++) q[r] = (__m512bh)_mm512_maskz_loadu_epi16(some, rows[r].q + k);
#pragma GCC unroll 4
                for (int j = 0; j < K; j++) {
                    const auto x = (__m512bh)_mm512_maskz_loadu_epi16(some, key + (i + j) * pitch + k);
                    for (int r = 0; r < R; r++) sum[j][r] = _mm512_dpbf16_ps(sum[j][r], x, q[r]);
                }
                next.fetch(K);
            }
            for (int j = 0; j < K; j++) {
                const __m512 scale = _mm512_set1_ps(span[s].scale ? span[s].scale[first + i + j] : 1);
                for (int r = 0; r < R; r++) total[j][r] = _mm512_fmadd_ps(sum[j][r], scale, total[j][r]);
            }
        }
        for (int j = 0; j < K; j++)
            for (int r = 0; r < R; r++) to[(i + j) * LANES + r] = _mm512_reduce_add_ps(total[j][r]);
    }
}

// Blocks of columns whose sums registers hold.
static constexpr int few_blocks(int rows) {
    return rows <= 2 ? 4 : rows <= 4 ? 2 : 1;
}

// sums[row] = sums[row] * fade[row] + weights . values, for R rows and B blocks of columns; `weights` of a
// block [R][keys] lie `keys` apart, an even number, and are 0 behind `count`.
template <int R, int B>
static void few_weigh(const bf16* const* values, const bf16* zeros, int64_t count, const bf16* const* weights,
                      int64_t keys, float* sums, int64_t width, const vf& fade, int64_t column) {
    Sum16 acc[B][R][2];
    for (int b = 0; b < B; b++)
        for (int r = 0; r < R; r++)
            for (int half = 0; half < 2; half++) {
                acc[b][r][half] = load_sum16(sums + r * width + column + b * BLOCK + half * LANES);
                scale(acc[b][r][half], fade[r]);
            }
    for (int64_t j = 0; j < count; j += 2) {
        const bf16* const first = values[j] + column;
        const bf16* const second = j + 1 < count ? values[j + 1] + column : nullptr;
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
            const Zipped v = zip(first + b * BLOCK, second ? second + b * BLOCK : zeros);
            for (int r = 0; r < R; r++) {
                const uint32_t weight = load<uint32_t>(weights[b] + r * keys + j);
                add_products(acc[b][r][0], v.first, weight);
                add_products(acc[b][r][1], v.second, weight);
            }
        }
    }
    for (int b = 0; b < B; b++)
        for (int r = 0; r < R; r++)
            for (int half = 0; half < 2; half++)
                store(sums + r * width + column + b * BLOCK + half * LANES, acc[b][r][half]);
}

// Weights of `rows` rows in fp32 [rows][KEYS], from those of keys [count][16]; zeros behind them.
template <int64_t KEYS>
static void turn_weights(const float* from, int64_t rows, int64_t count, float* to) {
    std::memset(to, 0, rows * KEYS * sizeof(float));
    for (int64_t j = 0; j < count; j++)
        for (int64_t r = 0; r < rows; r++) to[r * KEYS + j] = from[j * LANES + r];
}

// Rows of `size` weights, of `count` keys, times the scales of these, if there are any.
static void scale_weights(const float* from, const float* scale, int64_t rows, int64_t size, int64_t count,
                          bf16* to) {
    for (int64_t j = 0; j < size; j += LANES) {
        const vf factor = scale && j < count ? load<vf>(scale + j) : splat(1);  // none where no key was taken
        for (int64_t r = 0; r < rows; r++)
            store(to + r * size + j, narrow(load<vf>(from + r * size + j) * factor));
    }
}

}  // namespace mla
