// Attention in fp32, for processors without products of bf16. The keys of a block are widened once, for all
// query rows of the task, and as values as well where keys hold them. Scores are keys times queries, whose
// sixteen rows are a strip; values are weights times values, some columns at a time.
#pragma once
#include "attention.h"
#include "formats.h"
#include "fp32_tile.h"
#include "queries.h"

namespace mla {

constexpr int64_t KEYS = 72;            // of one block: widened, they stay in the second-level cache
constexpr int64_t QUERY_COLUMNS = 192;  // that the first-level cache holds, sixteen rows of them

constexpr int64_t FEW = 4;   // rows
constexpr int FEW_SUMS = 4;  // that do not wait for each other

#if defined(__AVX512F__)
constexpr int WEIGH_ROWS = 8, WEIGH_STRIPS = 2;  // value_width is a multiple of two strips
#else
constexpr int WEIGH_ROWS = TILE_ROWS, WEIGH_STRIPS = 1;
#endif

// The work of one task: keys arrive block after block.
class Attending : public Attention {
 public:
    static constexpr bool COPIES = true;  // so that rows may lie anywhere

    Attending(const Row* rows, int64_t count, int64_t key_width, int64_t value_width, float scale, int64_t,
              const Layout& layout)
        : Attention(rows, count, value_width, scale),
          layout_(layout),
          key_width_(key_width),
          q_(few() ? wide_rows(rows, count, key_width) : wide_queries(rows, count, key_width)) {}

    // Attend keys first .. first + count - 1, whose rows `keys` and `values` point to; where these are the
    // same pointers, a value is the beginning of its key. The keys [KEYS] that come next, if any, are fetched
    // to the second-level cache meanwhile: the processor cannot predict them.
    void attend(const bf16* const* keys, const bf16* const* values, int64_t first, int64_t count,
                const bf16* const* next = nullptr) {
        const Wide value = values == keys ? Wide{} : widened(values, count, width_, scratch<18>());
        score<1>(keys, first, count, next, 1, [&](int64_t p, int64_t, int64_t, int64_t, float* scores, int64_t, bool) {
            Panel& panel = panel_[p];
            const int64_t seen = std::min(count, panel.most - first);
            fade(panel, soften(panel, scores, first, seen, scale_, scores));
            weigh(panel, scores, value.rows ? value : key_, seen,
                  std::min<int64_t>(LANES, count_ - p * LANES));
        });
    }

    // Call use(p, first, 0, count, scores, column, true) for each `group` of panels, p the first, that sees any of these
    // keys: scores [group][count][16], `column` apart.
    template <int, class Use>
    void score(const bf16* const* keys, int64_t first, int64_t count, const bf16* const* next, int64_t group,
               const Use& use) {
        constexpr int64_t column = (KEYS + LANES - 1) / LANES * LANES * LANES;
        float* const scores = scratch<13>().take<float>(group * column);
        key_ = widened(keys, count, key_width_, scratch<16>());
        for (int64_t p = 0; p < panels_; p += group) {
            const int64_t seen = std::min(count, panel_[p].most - first);
            if (seen <= 0) continue;
            if (few()) score_few(seen, next, scores), next = nullptr;
            for (int64_t q = 0; q < group && !few(); q++, next = nullptr)
                score(q_ + (p + q) * key_width_ * LANES, key_, seen, next, scores + q * column);
            use(p, first, 0, count, scores, column, true);
        }
    }
    template <class Use>
    void finish_scores(const Use&) {}

 private:
    struct Wide {
        const float* rows;
        int64_t pitch;
    };
    // Rows at a distance that is an odd number of lines, so that they share out the cache sets.
    Wide widened(const bf16* const* rows, int64_t count, int64_t width, Buffer& buffer) const {
        const int64_t pitch = (width / LANES | 1) * LANES + (width % LANES ? 2 * LANES : 0);
        float* to = buffer.take<float>(KEYS * pitch);
        for (int64_t j = 0; j < count; j++) {
            for (int64_t k = 0; !layout_.count && k < width; k++) to[j * pitch + k] = widen(rows[j][k]);
            float* at = to + j * pitch;
            for (const Run& run : layout_)
                decode_run(layout_, run, (const uint8_t*)rows[j], at), at += run.columns;
        }
        return {to, pitch};
    }

    // Whether sixteen rows as the lanes of a vector would mostly be empty.
    bool few() const { return count_ <= FEW; }
    // Scores [count][16] of few rows, whose lanes are columns: dot products along the keys.
    void score_few(int64_t count, const bf16* const* next, float* to) const {
        const int64_t whole = key_width_ / PART * PART;
        for (int64_t j = 0; j < count; j++, to += LANES) {
            if (next) fetch(next + j, j + 1 < count ? 1 : KEYS - j, 0, key_width_);
            const float* const key = key_.rows + j * key_.pitch;
            for (int64_t r = 0; r < count_; r++) {
                const float* const q = q_ + r * key_width_;
                pf sum[FEW_SUMS] = {};
                int64_t k = 0;
                for (; k + FEW_SUMS * PART <= whole; k += FEW_SUMS * PART)
#pragma GCC unroll 4
                    for (int i = 0; i < FEW_SUMS; i++)
                        sum[i] += load<pf>(key + k + i * PART) * load<pf>(q + k + i * PART);
                for (; k < whole; k += PART) sum[0] += load<pf>(key + k) * load<pf>(q + k);
                const pf all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                float total = 0;
                for (int i = 0; i < PART; i++) total += all[i];
                for (; k < key_width_; k++) total += key[k] * q[k];
                to[r] = total;
            }
        }
    }

    // Scores [count][16] of a panel's queries q [key_width][16].
    void score(const float* q, const Wide& key, int64_t count, const bf16* const* next, float* to) {
        const int64_t blocks = (count + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t k = 0; k < key_width_; k += QUERY_COLUMNS) {
            const int64_t depth = std::min(QUERY_COLUMNS, key_width_ - k);
            for (int64_t block = 0, j = 0, rows; block < blocks; block++, j += rows) {
                rows = (count - j + blocks - block - 1) / (blocks - block);
                if (next) fetch(next + j, block + 1 < blocks ? rows : KEYS - j, k, depth);
                const RowMajor a = {key.rows + j * key.pitch + k, key.pitch};
                scores_of(rows)(a, {q + k * LANES, LANES, 0}, {to + j * LANES, LANES, k == 0}, depth, {});
            }
        }
    }
    void fetch(const bf16* const* rows, int64_t count, int64_t column, int64_t columns) const {
        if (layout_.count) columns = std::min(columns, (layout_.bytes + 1) / 2 - column);
        for (int64_t j = 0; j < count; j++)
            for (int64_t k = 0; k < columns; k += 2 * LANES) __builtin_prefetch(rows[j] + column + k, 0, 2);
    }

    void fade(Panel& panel, const vf& factors) const {
        for (int i = 0; i < LANES; i++)
            if (factors[i] != 1)
                for (int64_t c = 0; c < width_; c++) panel.sum[i * width_ + c] *= factors[i];
    }

    // panel.sum += weights . values, `rows` of them in use.
    void weigh(Panel& panel, const float* weights, const Wide& value, int64_t count, int64_t rows) const {
        if (few()) return weigh_few(panel, weights, value, count);
        const int64_t blocks = (rows + WEIGH_ROWS - 1) / WEIGH_ROWS;
        for (int64_t c = 0; c < width_; c += WEIGH_STRIPS * LANES)
            for (int64_t block = 0, i = 0, some; block < blocks; block++, i += some) {
                some = (rows - i + blocks - block - 1) / (blocks - block);
                const Sums sums = {panel.sum + i * width_ + c, width_, false};
                values_of(some)(Interleaved<LANES>{weights + i}, {value.rows + c, value.pitch, LANES}, sums,
                                count, {});
            }
    }

    // The same of few rows, with more columns at once: their sums would wait for each other.
    void weigh_few(Panel& panel, const float* weights, const Wide& value, int64_t count) const {
        unrolled<FEW>([&](auto i) {
            constexpr int rows = i + 1, most = REGISTERS / 2 / PARTS / rows;
            constexpr int strips = most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
            if (count_ != rows) return;
            for (int64_t c = 0; c < width_;) {
                const bool all = width_ - c >= strips * LANES;
                const Sums sums = {panel.sum + c, width_, false};
                const Strips columns = {value.rows + c, value.pitch, LANES};
                (all ? add_tile<rows, strips, false, Interleaved<LANES>>
                     : add_tile<rows, 1, false, Interleaved<LANES>>)({weights}, columns, sums, count, {});
                c += (all ? strips : 1) * LANES;
            }
        });
    }

    template <class A>
    using AddTile = void (*)(const A&, const Strips&, const Sums&, int64_t, Ahead);
    template <class A, int NP, int... MR>
    static AddTile<A> pick(int64_t rows, std::integer_sequence<int, MR...>) {
        static const AddTile<A> table[] = {add_tile<MR + 1, NP, false, A>...};
        return table[rows - 1];
    }
    static AddTile<RowMajor> scores_of(int64_t rows) {
        return pick<RowMajor, 1>(rows, std::make_integer_sequence<int, TILE_ROWS>());
    }
    static AddTile<Interleaved<LANES>> values_of(int64_t rows) {
        return pick<Interleaved<LANES>, WEIGH_STRIPS>(rows, std::make_integer_sequence<int, WEIGH_ROWS>());
    }

    const Layout& layout_;
    const int64_t key_width_;
    const float* const q_;  // [panels][key_width][16], of few [rows][key_width]
    Wide key_ = {};         // of the block
};

}  // namespace mla
