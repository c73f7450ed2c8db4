// Softmax attention of some query rows over some key rows, block by block with a running maximum: the part
// that does not depend on how products are computed; attention_fp32.h, attention_pairs.h and
// attention_tiles.h add that.
//
// Sixteen query rows are the lanes of a vector, so that a key row is used as it lies in memory, and the
// softmax is vertical. Rows may be (query, head) pairs that share one latent key, or queries of one head:
// both attention ops run on this.
#pragma once
#include <algorithm>
#include <cmath>

#include "accumulators.h"
#include "memory.h"
#include "tiles.h"

namespace mla {

// Whether weights and values are multiplied as pairs of keys in bf16. Columns of sums are in zipped order
// then.
constexpr bool PAIRED = MLA_TILES || MLA_DOT_BF16;

// One query row: where it is read and written, and how many keys it sees.
struct Row {
    const bf16* q;
    bf16* out;
    float* lse;
    int64_t visible;
};

struct Panel {
    float* sum;     // [16, dv]
    vf top, total;  // running maximum and sum of weights
    vf rounded;     // divides the sums: of weights as bf16 rounds them, where known, so that one which outweighs all cancels
    vi visible;     // keys each lane sees
    int64_t least, most;
};

// Where the sums of a row's columns c .. c + 15 lie: row by row, or in tiles.
static inline int64_t sum_at(int64_t row, int64_t c, int64_t width) {
    return MLA_TILES ? c * LANES + row * LANES : row * width + c;
}

// Where weights of two keys go that follow each other, for the lanes from `lane` on.
static inline void put_weights(uint32_t* weights, int64_t j, int lane, pf first, pf second) {
    store(weights + j / 2 * LANES + lane, narrow_pairs(first, second));
}
static inline void put_weights(float* weights, int64_t j, int lane, pf first, pf second) {
    store(weights + j * LANES + lane, first);
    store(weights + (j + 1) * LANES + lane, second);
}

// Some lanes of a panel: what `soften` does for PART rows from `lane` on.
template <class T>
static inline void soften_part(Panel& panel, int lane, float* score, int64_t first, int64_t count,
                               float scale, T* weights, float* fades) {
    typedef Vectors<WIDTH>::I pi;
    const bool masked = panel.least < first + count;
    const pf nothing = pf{} - INFINITY, old = load<pf>((float*)&panel.top + lane);
    const pi left = load<pi>((int32_t*)&panel.visible + lane) - (int32_t)first;
    pf top = nothing;
    for (int64_t j = 0; j < count; j++) {
        pf s = load<pf>(score + j * LANES + lane);
        if (masked) store(score + j * LANES + lane, s = left > (int32_t)j ? s : nothing);
        top = maximum(s, top);
    }
    top = maximum(top * scale, old);
    const pf base = top == nothing ? pf{} : top;
    const pf fade = exponential(old - base);
    pf total = {}, pair[2];
    for (int64_t j = 0; j < count + (count & 1); j++) {
        pf s = j < count ? load<pf>(score + j * LANES + lane) : nothing;
        pf weight = exponential(s * scale - base);
        pair[j & 1] = s == nothing ? pf{} : weight;
        total += pair[j & 1];
        if (j & 1) put_weights(weights, j - 1, lane, pair[0], pair[1]);
    }
    store((float*)&panel.top + lane, top);
    for (vf* sum : {&panel.total, &panel.rounded})
        store((float*)sum + lane, load<pf>((float*)sum + lane) * fade + total);
    store(fades + lane, fade);
}

// Turn a panel's scores [count][16] of keys first .. first + count - 1 into weights: pairs of keys [count /
// 2][16] in bf16, or fp32 [count][16], which may be the scores' memory; a key is added to an odd count, of
// weight 0. Returns the factor for the sums of earlier blocks.
template <class T>
static inline vf soften(Panel& panel, float* score, int64_t first, int64_t count, float scale, T* weights) {
    float fades[LANES];
    for (int lane = 0; lane < LANES; lane += PART)
        soften_part(panel, lane, score, first, count, scale, weights, fades);
    return load<vf>(fades);
}

// The state of one task: up to `panels` x 16 query rows, and what the keys seen so far gave.
class Attention {
 public:
    Attention(const Row* rows, int64_t count, int64_t value_width, float scale)
        : rows_(rows),
          count_(count),
          width_(value_width),
          scale_(scale),
          panels_((count + LANES - 1) / LANES) {
        panel_ = scratch<10>().take<Panel>(panels_);
        float* sum = scratch<12>().take<float>(panels_ * LANES * width_);
        std::memset(sum, 0, panels_ * LANES * width_ * sizeof(float));
        for (int64_t p = 0; p < panels_; p++) open(p, sum + p * LANES * width_);
    }

    int64_t most() const {
        int64_t most = 0;
        for (int64_t p = 0; p < panels_; p++) most = std::max(most, panel_[p].most);
        return most;
    }

    // Write the result: normalised rows and their log-sum-exp; 0 and -inf for a row that saw no key.
    void finish() const {
        for (int64_t i = 0; i < count_; i++) {
            const Panel& panel = panel_[i / LANES];
            const float total = panel.total[i % LANES], factor = total == 0 ? 0 : 1 / panel.rounded[i % LANES];
            for (int64_t c = 0; c < width_; c += 2 * LANES)
                round_to(rows_[i].out + c, load<vf>(panel.sum + sum_at(i % LANES, c, width_)) * factor,
                         load<vf>(panel.sum + sum_at(i % LANES, c + LANES, width_)) * factor);
            if (rows_[i].lse) *rows_[i].lse = total == 0 ? -INFINITY : std::log(total) + panel.top[i % LANES];
        }
    }

    // Save what a part of the keys gave, [rows, part_width] fp32, and merge it later.
    static int64_t part_width(int64_t value_width) { return value_width + 3; }
    int64_t part_size() const { return panels_ * LANES * part_width(width_); }
    void save(float* to) const;
    void merge(const float* from);

 protected:
    const Row* rows_;
    const int64_t count_, width_;
    const float scale_;
    const int64_t panels_;
    Panel* panel_;

 private:
    void open(int64_t p, float* sum) {
        Panel& panel = panel_[p];
        panel.sum = sum;
        panel.top = splat(-INFINITY), panel.total = panel.rounded = splat(0);
        panel.least = INT64_MAX, panel.most = 0;
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t row = p * LANES + i;
            const bool used = row < count_;
            const int64_t visible = used ? std::max<int64_t>(0, rows_[row].visible) : 0;
            panel.visible[i] = (int32_t)visible;
            panel.most = std::max(panel.most, visible);
            if (used) panel.least = std::min(panel.least, visible);
        }
    }
    static void round_to(bf16* to, vf first, vf second) {
        if (PAIRED) return store_unzipped(to, first, second);
        store(to, narrow(first));
        store(to + LANES, narrow(second));
    }
};

inline void Attention::save(float* to) const {
    for (int64_t p = 0; p < panels_; p++, to += LANES * part_width(width_)) {
        std::memcpy(to, panel_[p].sum, LANES * width_ * sizeof(float));
        store(to + LANES * width_, panel_[p].top);
        store(to + LANES * (width_ + 1), panel_[p].total);
        store(to + LANES * (width_ + 2), panel_[p].rounded);
    }
}

inline void Attention::merge(const float* from) {
    for (int64_t p = 0; p < panels_; p++, from += LANES * part_width(width_)) {
        Panel& panel = panel_[p];
        const vf top = load<vf>(from + LANES * width_), total = load<vf>(from + LANES * (width_ + 1));
        const vf both = maximum(top, panel.top), base = both == splat(-INFINITY) ? splat(0) : both;
        const vf old_factor = exponential(panel.top - base), new_factor = exponential(top - base);
        for (int64_t i = 0; i < LANES; i++)
            for (int64_t c = 0; c < width_; c += LANES) {
                const int64_t at = sum_at(i, c, width_);
                store(panel.sum + at,
                      load<vf>(panel.sum + at) * old_factor[i] + load<vf>(from + at) * new_factor[i]);
            }
        panel.total = panel.total * old_factor + total * new_factor;
        panel.rounded = panel.rounded * old_factor + load<vf>(from + LANES * (width_ + 2)) * new_factor;
        panel.top = both;
    }
}

}  // namespace mla
