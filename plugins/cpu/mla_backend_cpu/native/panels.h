// Weights in panels of 16 outputs, and where products are written. In bf16 a panel is [k / 2][16] pairs, so
// that one vector holds two inputs' weights of 16 outputs, and sixteen vectors an AMX tile; in fp32 it is
// [k][16].
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

// Where a panel holds the weight of output i and input k.
static inline int64_t place(const bf16*, int64_t i, int64_t k) {
    return k / 2 * 2 * LANES + 2 * i + (k & 1);
}
static inline int64_t place(const float*, int64_t i, int64_t k) {
    return k * LANES + i;
}

template <class T>
static inline void pack_panel(const T* rows, int64_t row, int64_t column, int64_t count, int64_t inputs,
                              T* panel) {
    for (int64_t k = 0; k < inputs; k++)
        for (int64_t i = 0; i < LANES; i++)
            panel[place(panel, i, k)] = i < count ? rows[i * row + k * column] : 0;
}
template <class T>
static inline void unpack_panel(const T* panel, int64_t count, int64_t inputs, T* rows) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < inputs; k++) rows[i * inputs + k] = panel[place(panel, i, k)];
}

// Where y goes, rounded to its elements' type.
template <class T>
struct Output {
    T* data;
    int64_t row;    // elements from one token to the next
    const T* bias;  // or null
    int64_t outputs;

    Output from(int64_t token, int64_t column) const {
        return {data + token * row + column, row, bias ? bias + column : nullptr, outputs - column};
    }
};

static inline float widen(float x) {
    return x;
}
static inline vf rounded(vf x, const float*) {
    return x;
}
static inline vh rounded(vf x, const bf16*) {
    return narrow(x);
}

template <class T>
static inline void store_panel(vf sum, const Output<T>& out, int64_t token, int64_t column) {
    int64_t count = std::min<int64_t>(LANES, out.outputs - column);
    T *to = out.data + token * out.row + column, part[LANES];
    if (out.bias) {
        vf bias = {};
        for (int64_t i = 0; i < count; i++) bias[i] = widen(out.bias[column + i]);
        sum += bias;
    }
    if (count == LANES) return store(to, rounded(sum, to));
    store(part, rounded(sum, to));
    std::memcpy(to, part, count * sizeof(T));
}

struct Grouped {  // [tokens, heads, width] by strides
    int64_t token, head;
};

// out[t, h, o] = sum over i of x[t, h, i] W[h, o, i], and a bias where there is one head.
template <class X, class T>
struct Product {
    const X* x;
    Grouped x_step;
    const T* packed;
    int64_t inputs;
    Output<T> out;
    int64_t out_head, tokens, heads;

    // The same of `most` tokens, or of those that are left.
    Product part(int64_t first, int64_t most) const {
        Product some = *this;
        some.x += first * x_step.token;
        some.out = out.from(first, 0);
        some.tokens = std::min(most, tokens - first);
        return some;
    }
};

}  // namespace mla
