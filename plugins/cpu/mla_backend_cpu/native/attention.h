// Softmax attention of some query rows over some key rows, block by block with a running maximum.
//
// Sixteen query rows are the lanes of a vector, so that a key row is used as it lies in memory: scores are
// dot(q lanes, one pair of the key), the softmax is vertical, and values are zipped pairwise on the way. Rows
// may be (query, head) pairs that share one latent key, or queries of one head: both attention ops run on
// this.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "memory.h"
#include "simd.h"

namespace mla {

constexpr int64_t KEYS = 120;  // of one block: its rows stay in the second-level cache while panels pass by

#if defined(__AVX512F__)
constexpr int KEYS_ONE = 24, KEYS_TWO = 12, WEIGH_ROWS = 8;
#else
constexpr int KEYS_ONE = 4, KEYS_TWO = 2, WEIGH_ROWS = 2;
#endif

// One query row: where it is read and written, and how many keys it sees.
struct Row {
    const bf16* q;
    bf16* out;
    float* lse;
    int64_t visible;
};

struct Panel {
    vu* q;          // [dk / 2] pairs of sixteen rows
    float* sum;     // [16, dv], columns in zipped order
    vf top, total;  // running maximum and sum of weights
    vi visible;     // keys each lane sees
    int64_t least, most;
};

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

// Turn a panel's scores [count][16] of keys first .. first + count - 1 into weights, as pairs of keys [count
// / 2][16]; returns what the sums of earlier blocks must be scaled by.
static inline vf soften(Panel& panel, float* score, int64_t first, int64_t count, float scale, vu* weights) {
    const bool masked = panel.least < first + count;
    const vf nothing = splat(-INFINITY);
    const vi left = panel.visible - (int32_t)first;
    vf top = nothing;
    for (int64_t j = 0; j < count; j++) {
        vf s = load<vf>(score + j * LANES);
        if (masked) store(score + j * LANES, s = left > (int32_t)j ? s : nothing);
        top = maximum(s, top);
    }
    top = maximum(top * scale, panel.top);
    const vf base = top == nothing ? splat(0) : top;
    const vf fade = exponential(panel.top - base);
    vf total = {}, pair[2];
    for (int64_t j = 0; j < count + (count & 1); j++) {
        vf s = j < count ? load<vf>(score + j * LANES) : nothing;
        vf weight = exponential(s * scale - base);
        pair[j & 1] = s == nothing ? splat(0) : weight;
        total += pair[j & 1];
        if (j & 1) weights[j / 2] = pair_up(narrow(pair[0]), narrow(pair[1]));
    }
    panel.top = top;
    panel.total = panel.total * fade + total;
    return fade;
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

// The work of one task: up to `panels` x 16 query rows against key blocks that arrive one after the other.
class Attention {
 public:
    Attention(const Row* rows, int64_t count, int64_t key_width, int64_t value_width, float scale)
        : rows_(rows),
          count_(count),
          pairs_(key_width / 2),
          width_(value_width),
          scale_(scale),
          panels_((count + LANES - 1) / LANES) {
        panel_ = scratch<10>().take<Panel>(panels_);
        vu* q = scratch<11>().take<vu>(panels_ * pairs_);
        float* sum = scratch<12>().take<float>(panels_ * LANES * width_);
        score_ = scratch<13>().take<float>(2 * KEYS * LANES);
        weights_ = scratch<14>().take<vu>(KEYS / 2 + 1);
        std::memset(sum, 0, panels_ * LANES * width_ * sizeof(float));
        for (int64_t p = 0; p < panels_; p++) open(p, q + p * pairs_, sum + p * LANES * width_);
    }

    int64_t most() const {
        int64_t most = 0;
        for (int64_t p = 0; p < panels_; p++) most = std::max(most, panel_[p].most);
        return most;
    }

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

    // Write the result: normalised rows and their log-sum-exp; 0 and -inf for a row that saw no key.
    void finish() const {
        for (int64_t i = 0; i < count_; i++) {
            const Panel& panel = panel_[i / LANES];
            const float total = panel.total[i % LANES], factor = total == 0 ? 0 : 1 / total;
            const float* sum = panel.sum + i % LANES * width_;
            for (int64_t c = 0; c < width_; c += 2 * LANES)
                store_unzipped(rows_[i].out + c, load<vf>(sum + c) * factor,
                               load<vf>(sum + c + LANES) * factor);
            if (rows_[i].lse) *rows_[i].lse = total == 0 ? -INFINITY : std::log(total) + panel.top[i % LANES];
        }
    }

    // Keep what a part of the keys gave, [rows, width + 2] fp32, and add it up again.
    int64_t part_size() const { return panels_ * LANES * (width_ + 2); }
    void save(float* to) const;
    void merge(const float* from);

 private:
    void open(int64_t p, vu* q, float* sum) {
        Panel& panel = panel_[p];
        panel.q = q, panel.sum = sum;
        panel.top = splat(-INFINITY), panel.total = splat(0);
        panel.least = INT64_MAX, panel.most = 0;
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t row = p * LANES + i;
            const bool used = row < count_;
            const int64_t visible = used ? std::max<int64_t>(0, rows_[row].visible) : 0;
            panel.visible[i] = (int32_t)visible;
            panel.most = std::max(panel.most, visible);
            if (used) panel.least = std::min(panel.least, visible);
            for (int64_t k = 0; k < pairs_; k++) {
                uint32_t pair = 0;
                if (used) std::memcpy(&pair, rows_[row].q + 2 * k, 4);
                ((uint32_t*)(q + k))[i] = pair;
            }
        }
    }

    void update(Panel& panel, float* score, const bf16* const* values, int64_t first, int64_t count) {
        if (panel.most <= first) return;
        count = std::min(count, panel.most - first);
        const vf fade = soften(panel, score, first, count, scale_, weights_);
        for (int row = 0; row < LANES; row += WEIGH_ROWS)
            for (int64_t c = 0; c < width_; c += 2 * LANES)
                weigh<WEIGH_ROWS>(values, zeros_, count, weights_, row, panel.sum + row * width_ + c, width_,
                                  fade, c);
    }

    const Row* rows_;
    const int64_t count_, pairs_, width_;
    const float scale_;
    const int64_t panels_;
    Panel* panel_;
    float* score_;
    vu* weights_;
    alignas(64) const bf16 zeros_[2 * LANES] = {};
};

inline void Attention::save(float* to) const {
    for (int64_t p = 0; p < panels_; p++, to += LANES * (width_ + 2)) {
        std::memcpy(to, panel_[p].sum, LANES * width_ * sizeof(float));
        store(to + LANES * width_, panel_[p].top);
        store(to + LANES * (width_ + 1), panel_[p].total);
    }
}

inline void Attention::merge(const float* from) {
    for (int64_t p = 0; p < panels_; p++, from += LANES * (width_ + 2)) {
        Panel& panel = panel_[p];
        const vf top = load<vf>(from + LANES * width_), total = load<vf>(from + LANES * (width_ + 1));
        const vf both = maximum(top, panel.top), base = both == splat(-INFINITY) ? splat(0) : both;
        const vf old_factor = exponential(panel.top - base), new_factor = exponential(top - base);
        for (int64_t i = 0; i < LANES; i++)
            for (int64_t c = 0; c < width_; c += LANES) {
                float* sum = panel.sum + i * width_ + c;
                store(sum, load<vf>(sum) * old_factor[i] + load<vf>(from + i * width_ + c) * new_factor[i]);
            }
        panel.total = panel.total * old_factor + total * new_factor;
        panel.top = both;
    }
}

}  // namespace mla
