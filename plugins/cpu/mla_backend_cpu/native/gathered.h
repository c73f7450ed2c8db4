// The keys of a block in groups of sixteen that lie at one pitch. A product then finds its keys at one
// address and multiples of the pitch: sixteen separate addresses do not fit the registers, and loading
// them costs as much as loading the keys. Keys that are stored as codes are decoded to such groups.
#pragma once
#include <algorithm>

#include "decoded.h"
#include "memory.h"
#include "simd.h"

namespace mla {

// Columns of keys, and the scale of each key that their products have to be multiplied by; null: none.
struct Span {
    int64_t column, columns;
    const float* scale;
};

// Lines of `count` rows to fetch to the second-level cache while something is computed, a few at a time.
class Lines {
 public:
    Lines() = default;
    Lines(const bf16* const* rows, int64_t count, int64_t lines)
        : row_(rows), end_(rows + count), lines_(lines) {}

    void fetch(int64_t count) {
        for (; count > 0 && row_ != end_; count--) {
            __builtin_prefetch((const char*)*row_ + 64 * line_, 0, 2);
            if (++line_ == lines_) line_ = 0, row_++;
        }
    }

 private:
    const bf16* const* row_ = nullptr;
    const bf16* const* end_ = nullptr;
    int64_t lines_ = 0, line_ = 0;
};

template <int64_t KEYS>
class Gathered {
 public:
    // Rows of `columns` elements, of which the first `value_columns` are the value of a key where codes are
    // stored. Adjacent plain rows lie `pitch` elements apart.
    Gathered(const Layout& layout, int64_t columns, int64_t value_columns, int64_t pitch)
        : layout_(layout),
          columns_(columns),
          pitch_(layout.count ? (columns / 32 | 1) * 32 + (columns % 32 ? 64 : 0) : pitch),
          copy_(scratch<17>().take<bf16>(KEYS * pitch_)),
          scales_(scratch<23>().take<float>(layout.count * KEYS)),
          spans_(scratch<24>().take<Span>(layout.count + 1)),
          parts_(scratch<26>().take<Stretch>(layout.count)) {
        spans_[0] = {0, columns, nullptr};
        int64_t column = 0;
        for (int64_t r = 0; r < layout.count; column += layout.runs[r++].columns) {
            const Run& run = layout.runs[r];
            spans_[r] = {column, run.columns, scales_ + r * KEYS};
            if (column < value_columns) value_spans_ = r + 1;
            if (!part_count_ || !parts_[part_count_ - 1].extended_by(run))
                parts_[part_count_++] = {run.kind, column, run.columns, run.codes};
        }
    }

    // Take the keys of group i out of keys [count]; where sixteen are not adjacent, or stored as codes, they
    // are copied, and filled up with zeros.
    void take(const bf16* const* keys, int64_t count, int64_t i) {
        const bf16* const* key = keys + i * LANES;
        const int64_t rows = std::min<int64_t>(LANES, count - i * LANES);
        bool neighbours = rows == LANES && !layout_.count;
        for (int64_t j = 1; j < rows; j++) neighbours &= key[j] == key[j - 1] + pitch_;
        group_[i] = neighbours ? key[0] : copy(i, key, rows);
        for (int64_t j = 0; j < LANES; j++) rows_[i * LANES + j] = group_[i] + j * pitch_;
    }

    const bf16* operator[](int64_t group) const { return group_[group]; }
    int64_t pitch() const { return pitch_; }
    bool decoded() const { return layout_.count; }
    // Whether those of group i are copies.
    bool copied(int64_t i) const { return group_[i] == copy_ + i * LANES * pitch_; }
    // The keys, where they lie for the products.
    const bf16* const* rows() const { return rows_; }
    // All columns of a key, and those that are its value.
    int64_t spans() const { return std::max<int64_t>(1, layout_.count); }
    int64_t value_spans() const { return value_spans_; }
    const Span& span(int64_t i) const { return spans_[i]; }
    // Lines of memory that a row takes.
    int64_t lines() const {
        return ((layout_.count ? layout_.bytes : columns_ * (int64_t)sizeof(bf16)) + 63) / 64;
    }

 private:
    const bf16* copy(int64_t i, const bf16* const* key, int64_t rows) {
        bf16* const group = copy_ + i * LANES * pitch_;
        if (layout_.count)
            decode(i * LANES, (const uint8_t* const*)key, rows, group);
        else
            copy_lines(key, rows, group);
        for (int64_t j = rows; j < LANES; j++) std::memset(group + j * pitch_, 0, columns_ * sizeof(bf16));
        return group;
    }
    // A line of each row in turn: memory answers more of them at once than where a row is read at a time.
    void copy_lines(const bf16* const* key, int64_t rows, bf16* to) {
        constexpr int64_t line = 2 * LANES;
        const int64_t whole = columns_ / line * line;
        for (int64_t k = 0; k < whole; k += line)
            for (int64_t j = 0; j < rows; j++) store(to + j * pitch_ + k, load<vu>(key[j] + k));
        for (int64_t j = 0; j < rows && whole < columns_; j++)
            std::memcpy(to + j * pitch_ + whole, key[j] + whole, (columns_ - whole) * sizeof(bf16));
    }
    void decode(int64_t first, const uint8_t* const* key, int64_t rows, bf16* to) {
        for (int64_t p = 0; p < part_count_; p++) decode_stretch(key, rows, parts_[p], to, pitch_);
        float* scale = scales_ + first;
        for (const Run& run : layout_) {
            scales_of(layout_, run, key, rows, scale);
            scale += KEYS;
        }
    }

    const Layout& layout_;
    const int64_t columns_, pitch_;
    bf16* const copy_;
    float* const scales_;  // [runs][KEYS]
    Span* const spans_;
    Stretch* const parts_;
    int64_t value_spans_ = 1, part_count_ = 0;
    const bf16 *group_[KEYS / LANES], *rows_[KEYS];
};

// Weights [count][16] in fp32 as pairs of keys in bf16, each times the scale of its key; a key is added to an
// odd count, of weight 0.
static inline void narrow_weights(const float* weights, const float* scale, int64_t count, vu* pairs) {
    for (int64_t j = 0; j < count; j += 2) {
        const vf second = j + 1 < count ? load<vf>(weights + (j + 1) * LANES) * scale[j + 1] : vf{};
        store(pairs + j / 2, narrow_pairs(load<vf>(weights + j * LANES) * scale[j], second));
    }
}

}  // namespace mla
