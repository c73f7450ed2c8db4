// Attention with products of one pair by sixteen rows: scores are dot(q lanes, one pair of the key), and
// values are zipped pairwise on the way.
#pragma once
#include <utility>

#include "attention.h"

namespace mla {

constexpr int64_t KEYS = 120;  // of one block: its rows stay in the second-level cache while panels pass by

#if defined(__AVX512F__)
constexpr int KEYS_ONE = 24, KEYS_TWO = 12, WEIGH_ROWS = 8;
#else
constexpr int KEYS_ONE = 4, KEYS_TWO = 2, WEIGH_ROWS = 2;
#endif

// q_i . k_j for KN keys and NP neighbouring panels (their q follow each other): scores [NP][KEYS][16].
template <int KN, int NP>
static void scores(const bf16* const* keys, const vu* q, int64_t pairs, float* to) {
    vf sum[KN][NP] = {};
    for (int64_t k = 0; k < pairs; k++) {
        vu b[NP];
        for (int p = 0; p < NP; p++) b[p] = q[p * pairs + k];
#pragma GCC unroll 32
        for (int i = 0; i < KN; i++) {
            uint32_t pair;
            std::memcpy(&pair, keys[i] + 2 * k, 4);
            for (int p = 0; p < NP; p++) sum[i][p] = dot(sum[i][p], b[p], pair);
        }
    }
    for (int i = 0; i < KN; i++)
        for (int p = 0; p < NP; p++) store(to + (p * KEYS + i) * LANES, sum[i][p]);
}

template <int NP, int... KN>
static void all_scores(const bf16* const* keys, int64_t count, const vu* q, int64_t pairs, float* to,
                       std::integer_sequence<int, KN...>) {
    static void (*const table[])(const bf16* const*, const vu*, int64_t, float*) = {scores<KN + 1, NP>...};
    const int64_t step = sizeof...(KN), blocks = (count + step - 1) / step,
                  even = (count + blocks - 1) / blocks;
    for (int64_t i = 0; i < count; i += even)
        table[std::min(even, count - i) - 1](keys + i, q, pairs, to + i * LANES);
}

// sum[row] = sum[row] * fade[row] + weights . values, for RN rows and 32 columns.
template <int RN>
static void weigh(const bf16* const* values, const bf16* zeros, int64_t count, const vu* weights, int row,
                  float* sum, int64_t width, const vf& fade, int64_t column) {
    vf acc[RN][2];
    for (int r = 0; r < RN; r++)
        for (int half = 0; half < 2; half++)
            acc[r][half] = load<vf>(sum + r * width + half * LANES) * fade[row + r];
    for (int64_t j = 0; j < count; j += 2) {
        Zipped v = zip(values[j] + column, j + 1 < count ? values[j + 1] + column : zeros);
        const uint32_t* weight = (const uint32_t*)(weights + j / 2) + row;
#pragma GCC unroll 16
        for (int r = 0; r < RN; r++) {
            acc[r][0] = dot(acc[r][0], v.first, weight[r]);
            acc[r][1] = dot(acc[r][1], v.second, weight[r]);
        }
    }
    for (int r = 0; r < RN; r++)
        for (int half = 0; half < 2; half++) store(sum + r * width + half * LANES, acc[r][half]);
}

// The work of one task: keys arrive block after block.
class Attending : public Attention {
 public:
    // Keys may lie anywhere; attend_tiles.h asks for their pitch.
    Attending(const Row* rows, int64_t count, int64_t key_width, int64_t value_width, float scale, int64_t)
        : Attention(rows, count, key_width, value_width, scale, 1),
          score_(scratch<13>().take<float>(2 * KEYS * LANES)),
          weights_(scratch<14>().take<vu>(KEYS / 2 + 1)) {}

    // Attend keys first .. first + count - 1, whose rows `keys` and `values` point to.
    void attend(const bf16* const* keys, const bf16* const* values, int64_t first, int64_t count) {
        for (int64_t p = 0; p < panels_;) {
            const bool two = p + 1 < panels_;
            if (std::max(panel_[p].most, two ? panel_[p + 1].most : 0) > first) {
                if (two)
                    all_scores<2>(keys, count, panel_[p].q, pairs_, score_,
                                  std::make_integer_sequence<int, KEYS_TWO>());
                else
                    all_scores<1>(keys, count, panel_[p].q, pairs_, score_,
                                  std::make_integer_sequence<int, KEYS_ONE>());
                for (int half = 0; half <= two; half++)
                    update(panel_[p + half], score_ + half * KEYS * LANES, values, first, count);
            }
            p += 1 + two;
        }
    }

 private:
    void update(Panel& panel, float* score, const bf16* const* values, int64_t first, int64_t count) {
        if (panel.most <= first) return;
        count = std::min(count, panel.most - first);
        const vf fade = soften(panel, score, first, count, scale_, weights_);
        for (int row = 0; row < LANES; row += WEIGH_ROWS)
            for (int64_t c = 0; c < width_; c += 2 * LANES)
                weigh<WEIGH_ROWS>(values, zeros_, count, weights_, row, panel.sum + sum_at(row, c, width_),
                                  width_, fade, c);
    }

    float* score_;
    vu* weights_;
};

}  // namespace mla
