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

// Whole rows out of KEYS to fetch while something is computed, from the i-th on, so many a time. Rows of several STREAMS take
// turns: next to each other they are fetched at two thirds of the rate.
class RowsAhead {
 public:
    RowsAhead(const bf16* const* next, int64_t i, int64_t rows, int64_t lines)
        : next_(next), rows_(next ? rows : 0), lines_(lines), i_(i) {}

    void fetch(int64_t) {
        for (int64_t end = i_ + rows_; i_ < end; i_++) fetch_row(next_, i_, lines_);
    }
    [[gnu::always_inline]] static void fetch_row(const bf16* const* next, int64_t i, int64_t lines) {
        const char* const row = (const char*)next[i % STREAMS * (KEYS / STREAMS) + i / STREAMS];
        for (int64_t line = 0; line < lines; line++) __builtin_prefetch(row + 64 * line, 0, 2);
    }

 private:
    static constexpr int64_t STREAMS = 8;

    const bf16* const* const next_;
    const int64_t rows_, lines_;
    int64_t i_;
};

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
          score_(scratch<13>().take<float>(2 * KEYS * LANES)),
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
        for (int64_t p = 0; p < panels_; p += 2) {
            const bool two = p + 1 < panels_;
            const int64_t most = two ? std::max(panel_[p].most, panel_[p + 1].most) : panel_[p].most;
            const int64_t seen = std::max<int64_t>(0, std::min(count, most - first));
            steps_[p] = (seen + TILE_DEPTH - 1) / TILE_DEPTH;
            if (!seen) continue;
            const bool all = two && first + count <= std::min(panel_[p].least, panel_[p + 1].least);
            if (all && count % TILE_DEPTH == 0 && !keys_.decoded() && whole_) {
                keys_.copied(0) ? soften_scores<true>(p, count) : soften_scores<false>(p, count);
                continue;
            }
            finish_softening();
            score(p, two, 0, (seen + LANES - 1) / LANES, score_, KEYS * LANES, next_);
            for (int half = 0; half <= two; half++) weight(p + half, score_ + half * KEYS * LANES, first, count, steps_[p]);
        }
        finish_softening();
        if (values == keys || keys_.decoded()) values = keys_.rows();
        if (panels_ == 1)
            weigh_one(values, count);
        else
            weigh_pairs(values, count);
    }

    // Call use(p, key, at, n, scores, column, ends) for each `group` of panels, p the first, and all sixteen keys from
    // position `key` on of which it sees any: scores [group][n][16] of those from key + at on, `column` apart. `ends`:
    // these, or all that are seen, are complete. GROUP is `group`, or 0 where it is not 2 or 4. Scores are used while
    // tiles multiply later keys, the last ones in finish_scores.
    template <int GROUP, class Use>
    void score(const bf16* const* keys, int64_t first, int64_t count, const bf16* const* next, int64_t group, const Use& use) {
        const bool pieces = (GROUP == 2 || GROUP == 4) && whole_ == 4 && !rest_ && !keys_.decoded();
        constexpr int64_t most = 2 * LANES;
        const int64_t steps = std::max<int64_t>(1, (group + 1) / 2 * whole_);
        float* const scores = scratch<13>().take<float>(2 * std::max<int64_t>(group + 1, 4) * TILE_FLOATS);
        take(keys, count);
        for (int64_t p = 0; p < panels_; p += group, next = nullptr) {
            const int64_t seen = std::min(count, panel_[p].most - first);
            int64_t i = 0;
            if constexpr (GROUP == 2 || GROUP == 4)
                if (pieces) i = score_pieces<4 / GROUP, GROUP>(p, first, seen, scores, next, use);
            if (i < seen) finish_scores(use);
            for (; i < seen; i += most) {
                const int64_t n = std::min(most, seen - i);
                RowsAhead ahead(next, i, most / steps, keys_.lines());
                for (int64_t q = 0; q < group; q += 2)
                    score(p + q, q + 1 < group, i / LANES, (i + n + LANES - 1) / LANES, scores + 2 * q * TILE_FLOATS,
                          2 * TILE_FLOATS, ahead);
                for (int64_t j = 0; j < n; j += LANES)
                    use(p, first + i + j, 0, std::min<int64_t>(LANES, n - j), scores + j * LANES, 2 * TILE_FLOATS, true);
            }
        }
    }
    template <class Use>
    void finish_scores(const Use& use) {
        if (ready_.scores) use_piece(ready_, use);
        if (held_.scores) {
            held_.tiles == 1 ? Block<1, 4>::store(held_.scores, 0, TILE_FLOATS)
                             : Block<2, 2>::store(held_.scores, TILE_FLOATS, 2 * TILE_FLOATS);
            use_piece(held_, use);
        }
        ready_ = held_ = Piece();
    }

 private:
    // Some tiles of keys whose scores with a group of panels are made together, and used together later.
    struct Piece {
        int64_t tiles, p, key;
        float* scores;  // or null: there is none
    };
    // Scores of two panels with 32 keys that registers of tiles hold: the first panel, or -1 if there are none, and the keys.
    struct Scored {
        int64_t p = -1, step = 0;
    };
    // Weights of two panels that see all keys of the block, 32 keys at a time. Their scores stay in registers until the next
    // keys' operands are loaded, as storing at once waits for the last products, and become weights while these are
    // multiplied. They share the first-level cache with the queries, past which keys that were copied are read ONCE.
    template <bool ONCE>
    void soften_scores(int64_t p, int64_t count) {
        typedef Block<2, 2> Sums;
        const bf16* const b[2] = {(const bf16*)(q_ + p * depth_), (const bf16*)(q_ + (p + 1) * depth_)};
        for (int64_t t = 0; t < count / TILE_DEPTH; t++) {
            const bf16* const a[2] = {keys_[2 * t], keys_[2 * t + 1]};
            const bf16* const rest[2] = {rests_ + 2 * t * TILE_BF16, rests_ + (2 * t + 1) * TILE_BF16};
            const auto before = [&](auto i) {
                if (scored_.p >= 0) Sums::template store_tile<i>(score_, TILE_FLOATS, 2 * TILE_FLOATS);
                tile::zero<i>();
            };
            Sums::template multiply<ONCE>(a, 0, keys_.pitch() * sizeof(bf16), b, 0, before);
            begin_softening();
            for (int64_t k = 1; k < whole_; k++) {
                Sums::template multiply<ONCE>(a, k * TILE_DEPTH, keys_.pitch() * sizeof(bf16), b, k * TILE_BF16);
                soft_.step();
            }
            if (rest_) Sums::multiply(rest, 0, TILE_ROW, b, whole_ * TILE_BF16);
            soft_.finish();
            scored_ = {p, t};
        }
    }
    void begin_softening() {
        const int64_t p = scored_.p;
        if (p >= 0) soft_.begin(panel_ + p, score_, scale_, width_, spread(p, 0), spread(p + 1, 0), scored_.step);
    }
    void finish_softening() {
        if (scored_.p >= 0) Block<2, 2>::store(score_, TILE_FLOATS, 2 * TILE_FLOATS);
        begin_softening();
        soft_.finish();
        scored_ = Scored();
    }
    template <class Use>
    static void use_piece(const Piece& piece, const Use& use) {
        for (int64_t m = 0; m < piece.tiles; m++)
            use(piece.p, piece.key + m * LANES, 0, LANES, piece.scores + m * TILE_FLOATS, piece.tiles * TILE_FLOATS, true);
    }
    // Scores of pieces, M whole tiles of keys with N panels; returns how many keys. They stay in their registers while the
    // operands of the next piece are loaded, as storing at once waits for the last products. A piece later they are used, some
    // keys after each product, as the processor looks ahead over few instructions.
    template <int M, int N, class Use>
    int64_t score_pieces(int64_t p, int64_t first, int64_t seen, float* scores, const bf16* const* next, const Use& use) {
        constexpr int DEPTH = 4, SOME = M * LANES / DEPTH;
        typedef Block<M, N> Sums;
        const bf16 *a[M], *b[N];
        for (int n = 0; n < N; n++) b[n] = (const bf16*)(q_ + (p + n) * DEPTH * LANES);
        const int64_t row = keys_.pitch() * sizeof(bf16);
        Piece held = held_, ready = ready_;
        int64_t i = 0;
        for (; i + M * LANES <= seen; i += M * LANES) {
            for (int m = 0; m < M; m++) a[m] = keys_[i / LANES + m];
            float* const to = held.scores ? held.scores : scores;
            unrolled<DEPTH>([&](auto k) {
                Sums::template multiply<true>(a, k * TILE_DEPTH, row, b, k * TILE_BF16, [&](auto i) {
                    if constexpr (k == 0) Sums::template store_tile<i>(to, TILE_FLOATS, M * TILE_FLOATS), tile::zero<i>();
                });
                for (int j = 0; j < SOME && next; j++) RowsAhead::fetch_row(next, i + k * SOME + j, DEPTH);
                constexpr int at = k * SOME, m = at / LANES;
                if (ready.scores)
                    use(ready.p, ready.key + m * LANES, std::integral_constant<int, at % LANES>(),
                        std::integral_constant<int, SOME>(), ready.scores + at * LANES, M * TILE_FLOATS,
                        std::integral_constant<bool, (at + SOME) % LANES == 0>());
            });
            ready = held;
            held = {M, p, first + i, to == scores ? scores + M * N * TILE_FLOATS : scores};
        }
        held_ = held, ready_ = ready;
        return i;
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
            keys_.copied(0) ? score_block<m, n, true>(p, i, to, column, ahead)
                            : score_block<m, n, false>(p, i, to, column, ahead);
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
    template <int M, int N, bool ONCE, class Fetched>
    void score_block(int64_t p, int64_t tile, float* to, int64_t column, Fetched& ahead) {
        const bf16 *a[M], *rest[M], *b[N];
        for (int m = 0; m < M; m++) a[m] = keys_[tile + m], rest[m] = rests_ + (tile + m) * TILE_BF16;
        for (int n = 0; n < N; n++) b[n] = (const bf16*)(q_ + (p + n) * depth_);
        for (int64_t s = 0, k = 0; s < keys_.spans(); s++) {
            const Span& span = keys_.span(s);
            Block<M, N>::zero();
            for (; k < (span.column + span.columns) / TILE_DEPTH; k++) {
                Block<M, N>::template multiply<ONCE>(a, k * TILE_DEPTH, keys_.pitch() * sizeof(bf16), b, k * TILE_BF16);
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
        store_sums();
    }
    // Add weights . values to the sums of M panels and N x 16 columns of a span. `zipped` steps of the values
    // are ready in the slots t & mask.
    template <int M, int N>
    void weigh(int64_t p, int64_t span, int64_t c, const bf16* const* values, int64_t count, int64_t& zipped,
               int64_t mask) {
        typedef Block<M, N> Sums;
        constexpr int64_t SOME = N * TILE_FLOATS / STEPS;  // sums of a panel that are fetched each step, for the next products
        const int64_t steps = steps_[p], row = LANES * width_;
        if (!steps) return;
        if (M == 1) store_sums();
        const bf16 *a[M], *b[N];
        for (int m = 0; m < M; m++) a[m] = (const bf16*)spread(p + m, span);
        for (int n = 0; n < N; n++) b[n] = zipped_ + n * TILE_BF16;
        float* sum = panel_[p].sum + sum_at(0, c, width_);
        const float* const next = p + M < panels_ ? sum + M * row : panel_->sum + sum_at(0, c + N * LANES, width_);
        for (int64_t t = 0; t < steps; t++) {
            for (; zipped < std::min(t + 2, steps); zipped++)  // one ahead
                zip_step<N>(values, count, zipped, c, zipped_ + (zipped & mask) * N * TILE_BF16);
            Sums::template multiply<M == 2>(a, t * TILE_BF16, TILE_ROW, b, (t & mask) * N * TILE_BF16, [&](auto i) {
                if (t) return;
                if (M == 2 && sums_) Sums::template store_tile<i>(sums_, row, TILE_FLOATS);
                Sums::template load_tile<i>(sum, row, TILE_FLOATS);
            });
            for (int64_t i = 0; M == 2 && i < SOME; i += LANES)
                __builtin_prefetch(next + t * SOME + i), __builtin_prefetch(next + row + t * SOME + i);
        }
        sums_ = sum;
        if (M == 1) Sums::store(sum, row, TILE_FLOATS), sums_ = nullptr;
    }
    // Sums of two panels stay in their registers until others take these.
    void store_sums() {
        if (sums_) Block<2, 2>::store(sums_, LANES * width_, TILE_FLOATS);
        sums_ = nullptr;
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
    float* sums_ = nullptr;  // which are in registers, or null
    Softening soft_;
    Scored scored_;
    Piece held_ = {}, ready_ = {};  // in registers of tiles, and in memory
    int64_t* steps_;  // of 32 keys that a pair of panels sees, at its first one
    alignas(64) const bf16 zeros_[2 * LANES] = {};
};

}  // namespace mla
