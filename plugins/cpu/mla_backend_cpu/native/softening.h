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
    // Two panels that see all keys of a step, 32 of their block, and their scores [2][32][16]. `first` and `second` are the
    // panels' tiles of weights [steps][row][pair], of which those of earlier steps are there, and that of this one is written.
    void begin(Panel* panels, const float* scores, float scale, int64_t width, uint32_t* first, uint32_t* second,
               int64_t step) {
        panel_ = panels, scores_ = scores, scale_ = scale, width_ = width, step_ = step;
        tiles_[0] = first, tiles_[1] = second, at_ = 0;
        for (int p = 0; p < 2; p++) top_[p] = splat(-INFINITY), total_[p] = rounded_[p] = vf{};
    }
    void step() {
        if (at_ == END) return;
        if (at_ < MAXIMA) {
            find_top(at_ * LANES);
            if (at_ + 1 == MAXIMA) settle();
        } else {
            weigh(at_ - MAXIMA);
        }
        if (++at_ == END)
            for (int p = 0; p < 2; p++) panel_[p].total += total_[p], panel_[p].rounded += rounded_[p];
    }
    void finish() {
        while (at_ < END) step();
    }

 private:
    // A panel's weights are relative to e^top, which is left as it is while they are below e^STEADY: sums are then not scaled.
    // What replaces it is a power of two, so that rounded weights are scaled without rounding them again.
    static constexpr float STEADY = 8, LOG2E = 1.44269504f, WHOLE = 12582912.0f;  // adding it rounds
    static constexpr int64_t MAXIMA = TILE_DEPTH / LANES, END = MAXIMA + TILE_DEPTH / 2;

    const float* scores(int p, int64_t key) const { return scores_ + (p * TILE_DEPTH + key) * LANES; }
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
            if (any_above(top, panel.top + STEADY)) {
                const vf most = (maximum(top, panel.top) * LOG2E + WHOLE - WHOLE) * (1 / LOG2E), old = panel.top;
                const vf fade = exponential(old - (most == splat(-INFINITY) ? vf{} : most));
                if (!same(old, -INFINITY) && !same(fade, 1)) {
                    scale_tiles(panel.sum, width_, fade);
                    fade_weights(tiles_[p], fade);
                }
                panel.total *= fade, panel.rounded *= fade, panel.top = most;
            }
            base_[p] = panel.top == splat(-INFINITY) ? vf{} : panel.top * LOG2E;
        }
    }
    void fade_weights(uint32_t* tiles, const vf& factors) const {
        for (int64_t i = 0; i < step_ * LANES; i++, tiles += LANES) {
            const vu pairs = load<vu>(tiles);
            store(tiles, narrow_pairs(low_half(pairs) * factors[i % LANES], high_half(pairs) * factors[i % LANES]));
        }
    }
    void weigh(int64_t pair) {
        for (int p = 0; p < 2; p++) {
            vf weight[2];
            for (int half = 0; half < 2; half++) {
                weight[half] = two_to(load<vf>(scores(p, 2 * pair + half)) * (scale_ * LOG2E) - base_[p]);
            }
            total_[p] += weight[0] + weight[1];
            pairs_[p][pair] = narrow_pairs(weight[0], weight[1]);
            rounded_[p] = add_pairs(rounded_[p], pairs_[p][pair]);
            if (pair == LANES - 1) transpose(pairs_[p], tiles_[p] + step_ * TILE_FLOATS);
        }
    }

    Panel* panel_ = nullptr;
    const float* scores_ = nullptr;
    int64_t width_ = 0, step_ = 0, at_ = END;
    float scale_ = 0;
    uint32_t* tiles_[2] = {};
    vf top_[2], base_[2], total_[2], rounded_[2];
    vu pairs_[2][LANES];
};

}  // namespace mla
