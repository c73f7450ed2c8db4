// Attention by AMX tiles. Scores are keys times queries: sixteen keys are a tile of A as they lie in memory,
// and a panel's pairs are tiles of B. Values are weights times values: weights are transposed to tiles of A,
// and values are zipped to tiles of B, some columns at a time, so that they stay in the first-level cache.
#pragma once
#include "accumulators.h"
#include "attention.h"
#include "gathered.h"
#include "queries.h"
#include "softening.h"

namespace mla {

constexpr int64_t KEYS = 256;                 // of one block
constexpr int64_t KEY_TILES = KEYS / LANES;   // when they are rows of A
constexpr int64_t FEW_SPANS = 4;              // whose sums are added in memory
constexpr int64_t STEPS = KEYS / TILE_DEPTH;  // when weights and values are summed over them

// The work of one task: keys arrive block after block.
class Attending : public Attention {
 public:
    static constexpr bool COPIES = false;

    // Adjacent keys lie `pitch` elements apart.
    Attending(const Row* rows, int64_t count, int64_t key_width, int64_t value_width, float scale,
              int64_t pitch, const Layout& layout)
        : Attention(rows, count, value_width, scale),
          depth_((key_width + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH / 2),
          q_(paired_queries(rows, count, key_width / 2, depth_)),
          keys_(layout, key_width, value_width, pitch),
          whole_(key_width / TILE_DEPTH),
          rest_(key_width % TILE_DEPTH),
          score_(scratch<13>().take<float>(4 * KEYS * LANES)),
          weights_(scratch<14>().take<vu>(KEYS / 2)),
          spread_(scratch<15>().take<uint32_t>(panels_ * keys_.value_spans() * STEPS * TILE_FLOATS)),
          zipped_(scratch<16>().take<bf16>(2 * STEPS * TILE_BF16)),
          rests_(scratch<18>().take<bf16>(rest_ ? KEY_TILES * TILE_BF16 : 0)),
          steps_(scratch<19>().take<int64_t>(panels_ + 1)) {}

    // Attend keys first .. first + count - 1, whose rows `keys` and `values` point to. Codes that come next,
    // up to KEYS, are fetched meanwhile, as decoding waits for them. Plain keys are not: tiles read sixteen
    // rows at a time, and were slower with prefetching, selected ones as well, however far ahead.
    void attend(const bf16* const* keys, const bf16* const* values, int64_t first, int64_t count,
                const bf16* const* next = nullptr) {
        next_ = next && keys_.decoded() ? Lines(next, KEYS, keys_.lines()) : Lines();
        take(keys, count);
        Softening soft;
        Between between = {next_, soft};
        for (int64_t p = 0; p < panels_; p += 2) {
            const bool two = p + 1 < panels_;
            const int64_t most = two ? std::max(panel_[p].most, panel_[p + 1].most) : panel_[p].most;
            const int64_t seen = std::max<int64_t>(0, std::min(count, most - first));
            steps_[p] = (seen + TILE_DEPTH - 1) / TILE_DEPTH;
            if (!seen) continue;
            float* const scores = score_ + p / 2 % 2 * 2 * KEYS * LANES;
            score(p, two, 0, (seen + LANES - 1) / LANES, scores, KEYS * LANES, between);
            soft.finish();
            const bool all = two && first + count <= std::min(panel_[p].least, panel_[p + 1].least);
            if (all && count % TILE_DEPTH == 0 && !keys_.decoded())
                soft.begin(panel_ + p, scores, KEYS * LANES, count, scale_, width_, spread(p, 0), spread(p + 1, 0));
            else
                for (int half = 0; half <= two; half++)
                    weight(p + half, scores + half * KEYS * LANES, first, count, steps_[p]);
        }
        soft.finish();
        if (values == keys || keys_.decoded()) values = keys_.rows();
        if (panels_ == 1)
            weigh_one(values, count);
        else
            weigh_pairs(values, count);
    }

    // Call use(p, i, n, scores, column, ends) for each `group` of panels, p the first, with n keys from i on, of the same
    // sixteen, if it sees any: scores [group][n][16], `column` apart. `ends`: these, or all that are seen, are complete.
    // Scores are used while tiles multiply the keys after them.
    template <class Use>
    void score(const bf16* const* keys, int64_t first, int64_t count, const bf16* const* next, int64_t group,
               const Use& use) {
        const int64_t pairs = (group + 1) / 2, size = group * PIECE * LANES, steps = std::max<int64_t>(1, pairs * whole_);
        float* const scores = scratch<13>().take<float>(2 * size);
        take(keys, count);
        const auto whole = keys_.decoded() || rest_ || whole_ != 4 || group % 2 ? nullptr
                           : pairs == 2 ? &Attending::score_piece<2, 4, Use>
                           : pairs == 1 ? &Attending::score_piece<1, 4, Use> : nullptr;
        Piece last = {};
        const auto use_last = [&](int64_t i) {
            const int64_t n = std::min<int64_t>(LANES, last.n - i);
            if (n > 0) use(last.p, last.i + i, n, last.scores + i * LANES, PIECE * LANES, true);
        };
        bool turn = false;
        for (int64_t p = 0; p < panels_; p += group)
            for (int64_t i = 0, seen = std::min(count, panel_[p].most - first); i < seen; i += PIECE, turn = !turn) {
                const Piece piece = {p, i, std::min(PIECE, seen - i), scores + turn * size};
                RowsAhead ahead(next && !p ? next + i : nullptr, PIECE / steps, keys_.lines());
                if (whole && piece.n == PIECE && last.n == PIECE) {
                    (this->*whole)(piece, last, ahead, use);
                } else
                    for (int64_t pair = 0; pair < std::max<int64_t>(pairs, 2); pair++) {
                        if (pair < pairs)
                            score(p + 2 * pair, 2 * pair + 1 < group, i / LANES, (i + piece.n + LANES - 1) / LANES,
                                  piece.scores + 2 * pair * PIECE * LANES, PIECE * LANES, ahead);
                        if (pair < 2) use_last(pair * LANES);
                    }
                last = piece;
            }
        use_last(0), use_last(LANES);
    }

 private:
    static constexpr int64_t PIECE = 2 * LANES;  // keys whose scores are used at a time

    // What attention does after each product of tiles for scores.
    struct Between {
        Lines& lines;
        Softening& soft;

        void fetch(int64_t count) {
            lines.fetch(count);
            soft.step();
        }
    };
    // Keys whose scores are made together, and used together later.
    struct Piece {
        int64_t p, i, n;
        float* scores;
    };
    // Scores of a whole piece whose rows are DEPTH tiles. After each product some keys of the last piece are used: the
    // processor looks ahead over few instructions.
    template <int PAIRS, int DEPTH, class Use>
    void score_piece(const Piece& piece, const Piece& last, RowsAhead& ahead, const Use& use) {
        typedef Block<2, 2> Sums;
        constexpr int SOME = PIECE / PAIRS / DEPTH;
        const int64_t row = keys_.pitch() * sizeof(bf16);
        const bf16* const a[2] = {keys_[piece.i / LANES], keys_[piece.i / LANES + 1]};
        unrolled<PAIRS>([&](auto pair) {
            const bf16* const q = (const bf16*)(q_ + (piece.p + 2 * pair) * DEPTH * LANES);
            const bf16* const b[2] = {q, q + DEPTH * TILE_BF16};
            Sums::zero();
            unrolled<DEPTH>([&](auto k) {
                constexpr int at = (pair * DEPTH + k) * SOME;
                Sums::multiply(a, k * TILE_DEPTH, row, b, k * TILE_BF16);
                ahead.template fetch<SOME, DEPTH>();
                use(last.p, last.i + at, std::integral_constant<int, SOME>(), last.scores + at * LANES, PIECE * LANES,
                    std::integral_constant<bool, (at + SOME) % LANES == 0>());
            });
            Sums::store(piece.scores + 2 * pair * PIECE * LANES, TILE_FLOATS, PIECE * LANES);
        });
    }
    void take(const bf16* const* keys, int64_t count) {
        for (int64_t i = 0; i * LANES < count; i++) keys_.take(keys, count, i);
        for (int64_t i = 0; rest_ && i * LANES < count; i++) copy_rest(i);
    }
    // The last columns of sixteen keys, filled up with zeros to a tile.
    void copy_rest(int64_t i) {
        for (int64_t j = 0; j < LANES; j++) {
            bf16* to = rests_ + i * TILE_BF16 + j * TILE_DEPTH;
            std::memset(to, 0, TILE_ROW);
            std::memcpy(to, keys_[i] + j * keys_.pitch() + whole_ * TILE_DEPTH, rest_ * sizeof(bf16));
        }
    }

    // Scores of one or two panels with the tiles of keys i .. end - 1: [panel][keys][16], panels `column` apart.
    template <class Fetched>
    void score(int64_t p, bool two, int64_t i, int64_t end, float* to, int64_t column, Fetched& ahead) {
        if (keys_.spans() > FEW_SPANS) {
            for (; i < end; i++, to += TILE_FLOATS)
                for (int half = 0; half <= two; half++) score_spans(p + half, i, to + half * column);
            return;
        }
        const auto block = [&](auto m, auto n) {
            score_block<m, n>(p, i, to, column, ahead);
            i += m, to += m * TILE_FLOATS;
        };
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> both;
        if (two) {
            while (i + 2 <= end) block(both, both);
            if (i < end) block(one, both);
            return;
        }
        while (i + 4 <= end) block(std::integral_constant<int, 4>(), one);
        if (i + 2 <= end) block(both, one);
        if (i < end) block(one, one);
    }
    template <int M, int N, class Fetched>
    void score_block(int64_t p, int64_t tile, float* to, int64_t column, Fetched& ahead) {
        const bf16 *a[M], *rest[M], *b[N];
        for (int m = 0; m < M; m++) a[m] = keys_[tile + m], rest[m] = rests_ + (tile + m) * TILE_BF16;
        for (int n = 0; n < N; n++) b[n] = (const bf16*)(q_ + (p + n) * depth_);
        for (int64_t s = 0, k = 0; s < keys_.spans(); s++) {
            const Span& span = keys_.span(s);
            Block<M, N>::zero();
            for (; k < (span.column + span.columns) / TILE_DEPTH; k++) {
                Block<M, N>::multiply(a, k * TILE_DEPTH, keys_.pitch() * sizeof(bf16), b, k * TILE_BF16);
                ahead.fetch(2 * M);
            }
            if (rest_ && s + 1 == keys_.spans()) Block<M, N>::multiply(rest, 0, TILE_ROW, b, whole_ * TILE_BF16);
            if (!span.scale)
                Block<M, N>::store(to, TILE_FLOATS, column);
            else
                add_scaled<M, N>(span.scale + tile * LANES, s == 0, to, column);
        }
    }
    // Scores of a panel with sixteen keys, whose sums over spans stay in registers. Four spans are summed at
    // once, as one would wait for itself.
    void score_spans(int64_t p, int64_t tile, float* to) {
        const bf16* const a = keys_[tile];
        const bf16 *const rest = rests_ + tile * TILE_BF16, *const b = (const bf16*)(q_ + p * depth_);
        float part[FEW_SPANS * TILE_FLOATS];
        vf sum[LANES] = {};
        for (int64_t s = 0; s < keys_.spans(); s += FEW_SPANS) {
            unrolled<FEW_SPANS>([&](auto i) {
                if (s + i < keys_.spans()) sum_span<i>(s + i, a, rest, b, part + i * TILE_FLOATS);
            });
            for (int64_t i = 0; i < std::min(FEW_SPANS, keys_.spans() - s); i++) {
                const float *const scale = keys_.span(s + i).scale + tile * LANES, *const from =
                                                                                       part + i * TILE_FLOATS;
#pragma GCC unroll 16
                for (int64_t j = 0; j < LANES; j++) sum[j] += load<vf>(from + j * LANES) * scale[j];
            }
        }
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES; j++) store(to + j * LANES, sum[j]);
    }
    // The products of one span of columns: [key][row].
    template <int T>
    void sum_span(int64_t s, const bf16* a, const bf16* rest, const bf16* b, float* to) {
        constexpr int A = 4 + T % 2 * 2, B = A + 1;
        const auto multiply = [&](const bf16* from, int64_t row, int64_t k) {
            tile::load<A>(from, row);
            tile::load<B>(b + k * TILE_BF16, TILE_ROW);
            tile::dot<T, A, B>();
            next_.fetch(8);
        };
        const Span& span = keys_.span(s);
        tile::zero<T>();
        for (int64_t k = span.column / TILE_DEPTH; k < (span.column + span.columns) / TILE_DEPTH; k++)
            multiply(a + k * TILE_DEPTH, keys_.pitch() * sizeof(bf16), k);
        if (rest_ && s + 1 == keys_.spans()) multiply(rest, TILE_ROW, whole_);
        tile::store<T>(to, TILE_ROW);
    }
    // Add sums of a span of columns to the scores, times the scales of its keys.
    template <int M, int N>
    static void add_scaled(const float* scale, bool first, float* to, int64_t column) {
        float part[M * N * TILE_FLOATS];
        Block<M, N>::store(part, TILE_FLOATS, M * TILE_FLOATS);
        for (int n = 0; n < N; n++, to += column)
            for (int64_t j = 0; j < M * LANES; j++) {
                const vf sum = load<vf>(part + n * M * TILE_FLOATS + j * LANES) * scale[j];
                store(to + j * LANES, first ? sum : load<vf>(to + j * LANES) + sum);
            }
    }

    // Turn a panel's scores into tiles of weights, zero where it sees no key, and scale its sums.
    void weight(int64_t p, float* scores, int64_t first, int64_t count, int64_t steps) {
        Panel& panel = panel_[p];
        const int64_t seen = std::max<int64_t>(0, std::min(count, panel.most - first));
        const bool plain = !keys_.decoded();
        if (seen) {
            const bool empty = same(panel.top, -INFINITY);
            const vf fade = plain ? soften(panel, scores, first, seen, scale_, (uint32_t*)weights_)
                                  : soften(panel, scores, first, seen, scale_, scores);
            if (!empty && !same(fade, 1)) scale_tiles(panel.sum, width_, fade);
        }
        if (!plain) return spread_scaled(p, scores, seen, steps);
        const int64_t pairs = (seen + 1) / 2;
        std::memset((void*)(weights_ + pairs), 0, (steps * LANES - pairs) * sizeof(vu));
        for (int64_t t = 0; t < steps; t++) transpose(weights_ + t * LANES, spread(p, 0) + t * TILE_FLOATS);
    }
    // The same of weights [seen][16] in fp32, times the scales of their keys: tiles for each span of values.
    void spread_scaled(int64_t p, float* weights, int64_t seen, int64_t steps) {
        std::memset(weights + seen * LANES, 0, (steps * TILE_DEPTH - seen) * LANES * sizeof(float));
        const int64_t rows = std::min<int64_t>(LANES, count_ - p * LANES);
        vu turned[2 * LANES];  // row by row, of 16 keys each
        for (int64_t t = 0; t < steps; t++) {
            for (int half = 0; half < 2; half++)
                transpose((const vu*)weights + (2 * t + half) * LANES, (uint32_t*)(turned + half * LANES));
            for (int64_t s = 0; s < keys_.value_spans(); s++) {
                const auto scale = [&](int64_t key) {  // which a group that was not taken lacks
                    return key < seen ? load<vf>(keys_.span(s).scale + key) : vf{};
                };
                const vf first = scale(t * TILE_DEPTH), second = scale(t * TILE_DEPTH + LANES);
                bf16* to = (bf16*)(spread(p, s) + t * TILE_FLOATS);
                for (int64_t row = 0; row < rows; row++, to += TILE_DEPTH) {
                    store(to, narrow((vf)turned[row] * first));
                    store(to + LANES, narrow((vf)turned[LANES + row] * second));
                }
            }
        }
    }
    uint32_t* spread(int64_t p, int64_t span) const {
        return spread_ + (p * keys_.value_spans() + span) * STEPS * TILE_FLOATS;
    }
    int64_t end_of(int64_t span) const {
        return span + 1 < keys_.value_spans() ? keys_.span(span + 1).column : width_;
    }

    // One panel takes 64 columns at a time, and zips into two slots that alternate.
    void weigh_one(const bf16* const* values, int64_t count) {
        for (int64_t s = 0, c = 0; s < keys_.value_spans(); s++)
            while (c < end_of(s)) {
                int64_t zipped = 0;
                if (c + 4 * LANES <= end_of(s))
                    weigh<1, 4>(0, s, c, values, count, zipped, 1), c += 4 * LANES;
                else
                    weigh<1, 2>(0, s, c, values, count, zipped, 1), c += 2 * LANES;
            }
    }
    // Several panels take 32 columns, which are zipped once for all of them.
    void weigh_pairs(const bf16* const* values, int64_t count) {
        for (int64_t s = 0, c = 0; s < keys_.value_spans(); s++)
            for (; c < end_of(s); c += 2 * LANES) {
                int64_t zipped = 0;
                for (int64_t p = 0; p < panels_; p += 2)
                    if (p + 1 < panels_)
                        weigh<2, 2>(p, s, c, values, count, zipped, STEPS - 1);
                    else
                        weigh<1, 2>(p, s, c, values, count, zipped, STEPS - 1);
            }
    }
    // Add weights . values to the sums of M panels and N x 16 columns of a span. `zipped` steps of the values
    // are ready in the slots t & mask.
    template <int M, int N>
    void weigh(int64_t p, int64_t span, int64_t c, const bf16* const* values, int64_t count, int64_t& zipped,
               int64_t mask) {
        const int64_t steps = steps_[p];
        if (!steps) return;
        const bf16 *a[M], *b[N];
        for (int m = 0; m < M; m++) a[m] = (const bf16*)spread(p + m, span);
        for (int n = 0; n < N; n++) b[n] = zipped_ + n * TILE_BF16;
        float* sum = panel_[p].sum + sum_at(0, c, width_);
        Block<M, N>::load(sum, LANES * width_, TILE_FLOATS);
        for (int64_t t = 0; t < steps; t++) {
            for (; zipped < std::min(t + 2, steps); zipped++)  // one ahead
                zip_step<N>(values, count, zipped, c, zipped_ + (zipped & mask) * N * TILE_BF16);
            Block<M, N>::multiply(a, t * TILE_BF16, TILE_ROW, b, (t & mask) * N * TILE_BF16);
        }
        Block<M, N>::store(sum, LANES * width_, TILE_FLOATS);
    }
    // Zip N x 16 columns of 32 values, zeros where there are fewer.
    template <int N>
    void zip_step(const bf16* const* values, int64_t count, int64_t t, int64_t c, bf16* to) {
        for (int64_t i = 0; i < LANES; i++, to += TILE_DEPTH)
            for (int n = 0; n < N; n += 2) {
                const int64_t j = t * TILE_DEPTH + 2 * i, at = c + n * LANES;
                const Zipped v =
                    zip(j < count ? values[j] + at : zeros_, j + 1 < count ? values[j + 1] + at : zeros_);
                store(to + n * TILE_BF16, v.first);
                store(to + (n + 1) * TILE_BF16, v.second);
                next_.fetch(2);
            }
    }

    const int64_t depth_;
    const vu* const q_;  // [panels][depth] pairs
    Gathered<KEYS> keys_;
    const int64_t whole_, rest_;
    float* score_;
    vu* weights_;
    uint32_t* spread_;  // weights in tiles, [panels][spans][STEPS][row][pair]
    bf16 *zipped_, *rests_;
    Lines next_;
    int64_t* steps_;  // of 32 keys that a pair of panels sees, at its first one
    alignas(64) const bf16 zeros_[2 * LANES] = {};
};

}  // namespace mla
