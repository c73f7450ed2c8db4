// Attention with products of one pair by sixteen rows: scores are dot(q lanes, one pair of the key), and
// values are zipped pairwise in between.
#pragma once
#include "accumulators.h"
#include "attention.h"
#include "attention_few.h"
#include "gathered.h"
#include "queries.h"

namespace mla {

constexpr int64_t KEYS = 128;  // of one block: its rows stay in the second-level cache while panels pass by

constexpr int KEYS_ONE = 16, KEYS_TWO = 8,
              WEIGH_ROWS = 8;  // of a tile of sums; half as many where two are kept

// If these were inlined into the loops of a task, not all sums would stay in registers.
#define OWN_REGISTERS [[gnu::noinline]]

// Rows to fetch while something is computed, so many pairs of elements of each of sixteen: one line with
// every pair, since sixteen pairs are a line.
struct Next {
    const bf16* const* rows;
    int64_t pairs;  // 0: nothing is fetched

    void fetch(int64_t k) const {
        if (k < pairs) __builtin_prefetch(rows[k & (LANES - 1)] + 2 * (k & -LANES), 0, 2);
    }
};

// The products of pair k of KN keys and NP neighbouring panels, whose q follow each other.
template <int KN, int NP>
static inline void add_pair(Sum16 (&sum)[KN][NP], const bf16* key, int64_t pitch, const vu* q, int64_t pairs,
                            int64_t k) {
    Pair16 b[NP];
    for (int p = 0; p < NP; p++) b[p] = load_pair16(q + p * pairs + k);
    const bf16* at = key + 2 * k;
#pragma GCC unroll 16
    for (int i = 0; i < KN; i++, at += pitch) {
        uint32_t pair;
        std::memcpy(&pair, at, 4);
        for (int p = 0; p < NP; p++) add_products(sum[i][p], b[p], pair);
    }
}

// q_i . k_j for KN keys and NP panels: scores [NP][KEYS][16].
template <int KN, int NP>
OWN_REGISTERS static void scores(const bf16* key, int64_t pitch, const vu* q, int64_t pairs, float* to,
                                 Next next) {
    Sum16 sum[KN][NP] = {};
    for (int64_t k = 0; k < pairs; k++) {
        next.fetch(k);
        add_pair(sum, key, pitch, q, pairs, k);
    }
    for (int i = 0; i < KN; i++)
        for (int p = 0; p < NP; p++) store(to + (p * KEYS + i) * LANES, sum[i][p]);
}

// The same where the keys are codes, over scales of their own in each span of columns; `first` is the first
// of these keys in the block.
template <int KN, int NP>
OWN_REGISTERS static void scaled_scores(const bf16* key, int64_t pitch, const vu* q, int64_t pairs, float* to,
                                        Next next, const Span* span, int64_t first) {
    Sum16 total[KN][NP] = {};
    int64_t k = 0;
    do {  // at least once, which the compiler must know to keep the sums in registers
        Sum16 sum[KN][NP] = {};
        for (const int64_t end = (span->column + span->columns) / 2; k < end; k++) {
            next.fetch(k);
            add_pair(sum, key, pitch, q, pairs, k);
        }
        const float* scale = span->scale + first;
#pragma GCC unroll 16
        for (int i = 0; i < KN; i++)
            for (int p = 0; p < NP; p++)
                total[i][p].part[0] = multiply_add(sum[i][p].part[0], scale[i], total[i][p].part[0]);
        span++;
    } while (k < pairs);
    for (int i = 0; i < KN; i++)
        for (int p = 0; p < NP; p++) store(to + (p * KEYS + i) * LANES, total[i][p]);
}

// sum[row] = sum[row] * fade[row] + weights . values, for RN rows and 32 columns.
template <int RN>
OWN_REGISTERS static void weigh(const bf16* const* values, const bf16* zeros, int64_t count,
                                const vu* weights, int row, float* sum, int64_t width, const vf& fade,
                                int64_t column) {
    Sum16 acc[RN][2];
#pragma GCC unroll 16
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            acc[r][half] = load_sum16(sum + r * width + half * LANES);
            scale(acc[r][half], fade[row + r]);
        }
    for (int64_t j = 0; j < count; j += 2) {
        Zipped v = zip(values[j] + column, j + 1 < count ? values[j + 1] + column : zeros);
        const uint32_t* weight = (const uint32_t*)(weights + j / 2) + row;
#pragma GCC unroll 16
        for (int r = 0; r < RN; r++) {
            add_products(acc[r][0], v.first, weight[r]);
            add_products(acc[r][1], v.second, weight[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < RN; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) store(sum + r * width + half * LANES, acc[r][half]);
}

// The work of one task: keys arrive block after block.
class Attending : public Attention {
 public:
    static constexpr bool COPIES = false;

    // Adjacent keys lie `pitch` elements apart.
    Attending(const Row* rows, int64_t count, int64_t key_width, int64_t value_width, float scale,
              int64_t pitch, const Layout& layout)
        : Attention(rows, count, value_width, scale),
          pairs_(key_width / 2),
          q_(paired_queries(rows, count, pairs_, pairs_)),
          keys_(layout, key_width, value_width, pitch),
          weights_(scratch<14>().take<vu>(KEYS / 2)) {}

    // Attend keys first .. first + count - 1, whose rows `keys` and `values` point to. The keys [KEYS] that
    // come next, if any, are fetched to the second-level cache meanwhile: the processor cannot predict them,
    // and memory latency, not bandwidth, is the limit.
    void attend(const bf16* const* keys, const bf16* const* values, int64_t first, int64_t count,
                const bf16* const* next = nullptr) {
        if (keys_.decoded()) values = keys_.rows();
        score<2>(keys, first, count, next, 2, [&](int64_t p, int64_t, int64_t, int64_t, float* scores, int64_t column, bool) {
            for (int64_t end = std::min(p + 2, panels_); p < end; p++, scores += column)
                update(panel_[p], scores, values, first, count);
        });
    }

    // Call use(p, first, 0, count, scores, column, true) for each `group` of panels, p the first, that sees any of these
    // keys: scores [group][count][16], `column` apart.
    template <int, class Use>
    void score(const bf16* const* keys, int64_t first, int64_t count, const bf16* const* next, int64_t group,
               const Use& use) {
        float* const scores = scratch<13>().take<float>(group * KEYS * LANES);
        bool taken = false;
        next_ = next ? Lines(next, KEYS, keys_.lines()) : Lines();
        for (int64_t p = 0; p < panels_; p += group) {
            const int64_t end = std::min(p + group, panels_);
            if (std::all_of(panel_ + p, panel_ + end,
                            [&](const Panel& panel) { return panel.most <= first; }))
                continue;
            float* to = scores;
            for (int64_t q = p; q < end; q += 2, next = nullptr, taken = true, to += 2 * KEYS * LANES)
                for (int64_t i = 0; i < count; i += LANES) {
                    if (!taken)
                        keys_.take(keys, count,
                                   i / LANES);  // which its first product finds in the nearest cache
                    if (few())
                        few_scores(i, to + i * LANES);
                    else if (q + 1 < end)
                        score_group<KEYS_TWO, 2>(q, i, next, to + i * LANES);
                    else
                        score_group<KEYS_ONE, 1>(q, i, next, to + i * LANES);
                }
            use(p, first, 0, count, scores, KEYS * LANES, true);
        }
    }
    template <class Use>
    void finish_scores(const Use&) {}

 private:
    bool few() const { return count_ <= FEW; }
    // Call f with the number of rows, up to FEW, as a constant.
    template <class F>
    void by_rows(const F& f) const {
        unrolled<FEW>([&](auto i) {
            if (count_ == i + 1) f(std::integral_constant<int, i + 1>());
        });
    }
    // Scores of NP panels with keys i .. i + 15 of the block.
    template <int KN, int NP>
    void score_group(int64_t p, int64_t i, const bf16* const* next, float* to) {
        const bf16* key = keys_[i / LANES];
        const int64_t pitch = keys_.pitch();
        const Next fetched = {next + i, next ? keys_.lines() * LANES : 0}, nothing = {};
        const vu* q = q_ + p * pairs_;
        if (keys_.decoded())
            for (int j = 0; j < LANES; j += KN / 2)
                scaled_scores<KN / 2, NP>(key + j * pitch, pitch, q, pairs_, to + j * LANES,
                                          j ? nothing : fetched, &keys_.span(0), i + j);
        else
            for (int j = 0; j < LANES; j += KN)
                scores<KN, NP>(key + j * pitch, pitch, q, pairs_, to + j * LANES, j ? nothing : fetched);
    }
    void update(Panel& panel, float* score, const bf16* const* values, int64_t first, int64_t count) {
        if (panel.most <= first) return;
        count = std::min(count, panel.most - first);
        if (few())
            return update_few(panel, score, values, count, soften(panel, score, first, count, scale_, score));
        if (!keys_.decoded()) {
            const vf fade = soften(panel, score, first, count, scale_, (uint32_t*)weights_);
            return add_values(panel, values, count, 0, width_, fade);
        }
        const vf fade = soften(panel, score, first, count, scale_, score);
        for (int64_t s = 0; s < keys_.value_spans(); s++) {
            const Span& span = keys_.span(s);
            narrow_weights(score, span.scale, count, weights_);
            add_values(panel, values, count, span.column, span.column + span.columns, fade);
        }
    }
    // Scores with keys i .. i + 15 of the block. Sums and totals of many spans share the registers.
    void few_scores(int64_t i, float* to) {
        by_rows([&](auto r) {
            constexpr int most = r <= 4 ? 4 : 2;
            (keys_.spans() == 1 ? mla::few_scores<r, most>
                                : mla::few_scores<r, (r > 2 ? most / 2 : most)>)(rows_, keys_[i / LANES],
                                                                                 keys_.pitch(),
                                                                                 &keys_.span(0),
                                                                                 keys_.spans(), i, to, next_);
        });
    }
    // The same of few rows, whose weights `soften` has made in place.
    void update_few(Panel& panel, const float* weights, const bf16* const* values, int64_t count,
                    const vf& fade) {
        const int64_t spans = keys_.value_spans(), size = count_ * KEYS;
        float* const turned = scratch<16>().take<float>(size);
        turn_weights<KEYS>(weights, count_, count, turned);
        bf16* const scaled = scratch<15>().take<bf16>(spans * size);
        for (int64_t s = 0; s < spans; s++)
            scale_weights(turned, keys_.span(s).scale, count_, KEYS, count, scaled + s * size);
        const bf16* of[4];
        int64_t s = 0;
        for (int64_t c = 0, blocks; c < width_; c += blocks * BLOCK) {
            const int64_t most = few_blocks((int)count_);
            blocks = width_ - c < most * BLOCK ? 1 : most;
            for (int64_t b = 0; b < blocks; b++) {
                while (keys_.decoded() && c + b * BLOCK >= keys_.span(s).column + keys_.span(s).columns) s++;
                of[b] = scaled + s * size;
            }
            by_rows([&](auto r) {
                (blocks == 1 ? few_weigh<r, 1> : few_weigh<r, few_blocks(r)>)(values, zeros_, count, of, KEYS,
                                                                              panel.sum, width_, fade, c);
            });
        }
    }
    void add_values(Panel& panel, const bf16* const* values, int64_t count, int64_t begin, int64_t end,
                    const vf& fade) const {
        for (int64_t c = begin; c < end; c += 2 * LANES)
            for (int row = 0; row < LANES; row += WEIGH_ROWS)
                weigh<WEIGH_ROWS>(values, zeros_, count, weights_, row, panel.sum + sum_at(row, c, width_),
                                  width_, fade, c);
    }

    const int64_t pairs_;
    const vu* const q_;  // [panels][pairs]
    Gathered<KEYS> keys_;
    vu* weights_;
    Lines next_;
    alignas(64) const bf16 zeros_[2 * LANES] = {};
};

}  // namespace mla
