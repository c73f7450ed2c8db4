// Query rows sixteen by sixteen, as the lanes of vectors.
#pragma once
#include <algorithm>

#include "attention.h"

namespace mla {

// Pairs k .. k + 15 of sixteen rows from `first` on, sixteen rows next to each other; zeros for a row that
// there is not.
static inline void turn_pairs(const Row* rows, int64_t first, int64_t count, int64_t k, int64_t pairs,
                              uint32_t* to) {
    const int64_t width = std::min<int64_t>(LANES, pairs - k);
    vu lines[LANES], columns[LANES];
    for (int64_t i = 0; i < LANES; i++) {
        const bool used = first + i < count;
        lines[i] = used && width == LANES ? load<vu>(rows[first + i].q + 2 * k) : vu{};
        if (used && width < LANES)
            std::memcpy(&lines[i], rows[first + i].q + 2 * k, width * sizeof(uint32_t));
    }
    transpose(lines, width == LANES ? to : (uint32_t*)columns);
    if (width < LANES) std::memcpy(to, columns, width * sizeof(vu));
}

// All rows in panels of [depth] vectors of pairs, filled up with zeros.
static inline vu* paired_queries(const Row* rows, int64_t count, int64_t pairs, int64_t depth) {
    const int64_t panels = (count + LANES - 1) / LANES;
    vu* const q = scratch<11>().take<vu>(panels * depth);
    for (int64_t p = 0; p < panels; p++) {
        std::memset((void*)(q + p * depth + pairs), 0, (depth - pairs) * sizeof(vu));
        for (int64_t k = 0; k < pairs; k += LANES)
            turn_pairs(rows, p * LANES, count, k, pairs, (uint32_t*)(q + p * depth + k));
    }
    return q;
}

// All rows in panels of [width][16] in fp32; `width` is even.
static inline float* wide_queries(const Row* rows, int64_t count, int64_t width) {
    const int64_t panels = (count + LANES - 1) / LANES;
    float* const q = scratch<11>().take<float>(panels * width * LANES);
    vu pairs[LANES];
    for (int64_t p = 0; p < panels; p++)
        for (int64_t k = 0; k < width / 2; k += LANES) {
            turn_pairs(rows, p * LANES, count, k, width / 2, (uint32_t*)pairs);
            float* to = q + (p * width + 2 * k) * LANES;
            for (int64_t i = 0; i < std::min<int64_t>(LANES, width / 2 - k); i++, to += 2 * LANES) {
                store(to, low_half(pairs[i]));
                store(to + LANES, high_half(pairs[i]));
            }
        }
    return q;
}

// Up to sixteen rows in fp32, as they are: [rows][width].
static inline float* wide_rows(const Row* rows, int64_t count, int64_t width) {
    float* const q = scratch<11>().take<float>(count * width);
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < width; k++) q[i * width + k] = widen(rows[i].q[k]);
    return q;
}

}  // namespace mla
