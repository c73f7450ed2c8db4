// Weights in panels of 16 outputs, panel[k / 2][16] pairs, so that one vector holds two inputs' weights of 16
// outputs, and sixteen vectors an AMX tile; and where products are written.
#pragma once
#include <algorithm>

#include "accumulators.h"

namespace mla {

static inline int64_t panels_of(int64_t outputs) {
    return (outputs + LANES - 1) / LANES;
}
static inline int64_t packed_size(int64_t outputs, int64_t inputs) {
    return panels_of(outputs) * LANES * inputs;
}

static inline void pack_panel(const bf16* rows, int64_t row, int64_t column, int64_t count, int64_t inputs,
                              bf16* panel) {
    for (int64_t k = 0; k < inputs; k++)
        for (int64_t i = 0; i < LANES; i++)
            panel[(k / 2) * 2 * LANES + 2 * i + (k & 1)] = i < count ? rows[i * row + k * column] : 0;
}
static inline void unpack_panel(const bf16* panel, int64_t count, int64_t inputs, bf16* rows) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < inputs; k++)
            rows[i * inputs + k] = panel[(k / 2) * 2 * LANES + 2 * i + (k & 1)];
}

struct Output {
    bf16* data;
    int64_t row;       // elements from one token to the next
    const bf16* bias;  // or null
    int64_t outputs;

    Output from(int64_t token, int64_t column) const {
        return {data + token * row + column, row, bias ? bias + column : nullptr, outputs - column};
    }
};

static inline void store_panel(vf sum, const Output& out, int64_t token, int64_t column) {
    int64_t count = std::min<int64_t>(LANES, out.outputs - column);
    bf16 *to = out.data + token * out.row + column, rounded[LANES];
    if (out.bias) {
        vf bias = {};
        for (int64_t i = 0; i < count; i++) bias[i] = widen(out.bias[column + i]);
        sum += bias;
    }
    if (count == LANES) return store(to, narrow(sum));
    store(rounded, narrow(sum));
    std::memcpy(to, rounded, count * sizeof(bf16));
}

// The same for NR neighbouring panels.
template <int NR>
static inline void store_panels(const Sum16 (&sum)[NR], const Output& out, int64_t token, int64_t column) {
    if (out.bias || column + NR * LANES > out.outputs) {
        for (int j = 0; j < NR; j++) store_panel(whole(sum[j]), out, token, column + j * LANES);
        return;
    }
    bf16* to = out.data + token * out.row + column;
    for (int j = 0; j < NR; j++) store(to + j * LANES, narrow(whole(sum[j])));
}

struct Grouped {  // [tokens, heads, width] by strides
    int64_t token, head;
};

}  // namespace mla
