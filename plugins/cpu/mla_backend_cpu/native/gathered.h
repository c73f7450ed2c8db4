// The keys of a block in groups of sixteen that lie at one pitch. A product then finds its keys at one
// address and multiples of the pitch: sixteen separate addresses do not fit the registers, and loading
// them costs as much as loading the keys.
#pragma once
#include <algorithm>

#include "memory.h"
#include "simd.h"

namespace mla {

template <int64_t KEYS>
class Gathered {
 public:
    // Rows of `columns` elements; adjacent ones lie `pitch` elements apart.
    Gathered(int64_t columns, int64_t pitch)
        : columns_(columns), pitch_(pitch), copy_(scratch<17>().take<bf16>(KEYS * pitch)) {}

    // Take keys [count]; where sixteen are not adjacent they are copied, and filled up with zeros.
    void take(const bf16* const* keys, int64_t count) {
        for (int64_t i = 0; i * LANES < count; i++) {
            const bf16* const* key = keys + i * LANES;
            const int64_t rows = std::min<int64_t>(LANES, count - i * LANES);
            bool neighbours = rows == LANES;
            for (int64_t j = 1; j < rows; j++) neighbours &= key[j] == key[j - 1] + pitch_;
            group_[i] = neighbours ? key[0] : copy(i, key, rows);
        }
    }

    const bf16* operator[](int64_t group) const { return group_[group]; }
    int64_t pitch() const { return pitch_; }

 private:
    const bf16* copy(int64_t i, const bf16* const* key, int64_t rows) {
        bf16* const group = copy_ + i * LANES * pitch_;
        for (int64_t j = 0; j < LANES; j++)
            if (j < rows)
                std::memcpy(group + j * pitch_, key[j], columns_ * sizeof(bf16));
            else
                std::memset(group + j * pitch_, 0, columns_ * sizeof(bf16));
        return group;
    }

    const int64_t columns_, pitch_;
    bf16* const copy_;
    const bf16* group_[KEYS / LANES];
};

}  // namespace mla
