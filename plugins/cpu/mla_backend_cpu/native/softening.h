// The softmax of two panels in small steps, which are taken between products of tiles: first the largest scores, then the
// weights of two keys at a time, which become tiles of weights.
#pragma once
#include "attention.h"

namespace mla {

// Sums of a panel in tiles, times a factor of each row.
static inline void scale_tiles(float* sum, int64_t width, const vf& factors) {
    for (int64_t c = 0; c < width; c += LANES)
        for (int64_t row = 0; row < LANES; row++, sum += LANES) store(sum, load<vf>(sum) * factors[row]);
}

class Softening {
 public:
    // Panels that see all of `count` keys, a multiple of 32, and their scores [count][16], `column` apart. Tiles
    // [count / 32][row][pair] are written.
    void begin(Panel* panels, const float* scores, int64_t column, int64_t count, float scale, int64_t width,
               uint32_t* first, uint32_t* second) {
        panel_ = panels, scores_ = scores, column_ = column, scale_ = scale, width_ = width;
        tiles_[0] = first, tiles_[1] = second;
        maxima_ = count / LANES, at_ = 0, end_ = maxima_ + count / 2;
        for (int p = 0; p < 2; p++) top_[p] = splat(-INFINITY), total_[p] = vf{};
    }
    void step() {
        if (at_ == end_) return;
        if (at_ < maxima_) {
            find_top(at_ * LANES);
            if (at_ + 1 == maxima_) settle();
        } else {
            weigh(at_ - maxima_);
        }
        if (++at_ == end_)
            for (int p = 0; p < 2; p++) panel_[p].total += total_[p];
    }
    void finish() {
        while (at_ < end_) step();
    }

 private:
    // A panel's weights are relative to e^top, which is left as it is while they are below e^STEADY: sums are then not scaled.
    static constexpr float STEADY = 8, LOG2E = 1.44269504f;

    const float* scores(int p, int64_t key) const { return scores_ + p * column_ + key * LANES; }
    void find_top(int64_t key) {
        for (int p = 0; p < 2; p++) {
            vf top = top_[p];
            for (int64_t j = 0; j < LANES; j++) top = maximum(load<vf>(scores(p, key + j)), top);
            top_[p] = top;
        }
    }
    void settle() {
        for (int p = 0; p < 2; p++) {
            Panel& panel = panel_[p];
            const vf top = top_[p] * scale_;
            bool steady = true;
            for (int i = 0; i < LANES; i++) steady &= top[i] <= panel.top[i] + STEADY;
            if (!steady) {
                const vf most = maximum(top, panel.top), old = panel.top;
                const vf fade = exponential(old - (most == splat(-INFINITY) ? vf{} : most));
                if (!same(old, -INFINITY) && !same(fade, 1)) scale_tiles(panel.sum, width_, fade);
                panel.total *= fade, panel.top = most;
            }
            base_[p] = panel.top == splat(-INFINITY) ? vf{} : panel.top * LOG2E;
        }
    }
    void weigh(int64_t pair) {
        for (int p = 0; p < 2; p++) {
            vf weight[2];
            for (int half = 0; half < 2; half++) {
                weight[half] = two_to(load<vf>(scores(p, 2 * pair + half)) * (scale_ * LOG2E) - base_[p]);
            }
            total_[p] += weight[0] + weight[1];
            pairs_[p][pair % LANES] = narrow_pairs(weight[0], weight[1]);
            if (pair % LANES == LANES - 1) transpose(pairs_[p], tiles_[p] + pair / LANES * LANES * LANES);
        }
    }

    Panel* panel_ = nullptr;
    const float* scores_ = nullptr;
    int64_t column_ = 0, width_ = 0, maxima_ = 0, at_ = 0, end_ = 0;
    float scale_ = 0;
    uint32_t* tiles_[2] = {};
    vf top_[2], base_[2], total_[2];
    vu pairs_[2][LANES];
};

}  // namespace mla
