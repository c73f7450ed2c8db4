// Weights into panels and back, one panel at a time.
#pragma once
#include "huge_pages.h"
#include "panels.h"

namespace mla {

// weight [groups, outputs, inputs] by strides.
template <class T>
static void pack(const T* weight, int64_t group, int64_t row, int64_t column, int64_t groups, int64_t outputs,
                 int64_t inputs, T* packed, int threads) {
    const int64_t panels = panels_of(outputs);
    const size_t bytes = groups * packed_size(outputs, inputs) * sizeof(T);
    want_huge_pages(packed, bytes);
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < groups * panels; task++) {
        const int64_t g = task / panels, first = task % panels * LANES;
        pack_panel(weight + g * group + first * row, row, column, std::min<int64_t>(LANES, outputs - first),
                   inputs, packed + task * LANES * inputs);
    }
    make_huge_pages(packed, bytes);
}

// The same weight, contiguous.
template <class T>
static void unpack(const T* packed, int64_t groups, int64_t outputs, int64_t inputs, T* weight, int threads) {
    const int64_t panels = panels_of(outputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < groups * panels; task++) {
        const int64_t g = task / panels, first = task % panels * LANES;
        unpack_panel(packed + task * LANES * inputs, std::min<int64_t>(LANES, outputs - first), inputs,
                     weight + (g * outputs + first) * inputs);
    }
}

}  // namespace mla
