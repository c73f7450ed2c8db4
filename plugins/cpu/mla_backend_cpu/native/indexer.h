// The indexer of sparse attention: the cache write of its keys, and the selection of the tokens whose keys
// score best. Scores are made as attention makes them, block by block with the products of the instruction
// set at hand; of each query, at most about twice as many candidates are kept as are selected.
#pragma once
#include <numeric>

#include "latent.h"
#include "pointwise.h"

namespace mla {

// ------------------------------------------------------------------------------------------- cache write

struct KeyWrite {
    const bf16* k;  // [T, width] by rows
    int64_t row;
    const bf16 *weight, *bias;
    float eps;
    const float* cos_sin;  // [T, rotary] by rows
    int64_t angle_row;
    const int64_t* slots;
    uint8_t* cache;
    int64_t page_size;
    bool coded;  // pages of codes [page, width], and then scales [page]; else bf16
    int64_t tokens, width, rotary;
    bool interleaved;
};

// (x - mean) / sqrt(var + eps) * weight + bias
static inline void layer_norm_row(const KeyWrite& a, const bf16* x, float* out) {
    vf part = {}, squares = {};
    for (int64_t k = 0; k < a.width; k += LANES) part += widen(load<vh>(x + k));
    float mean = 0, square = 0;
    for (int i = 0; i < LANES; i++) mean += part[i];
    mean /= a.width;
    for (int64_t k = 0; k < a.width; k += LANES) {
        const vf centred = widen(load<vh>(x + k)) - mean;
        squares += centred * centred;
    }
    for (int i = 0; i < LANES; i++) square += squares[i];
    const float factor = 1 / std::sqrt(square / a.width + a.eps);
    for (int64_t k = 0; k < a.width; k += LANES)
        store(out + k, (widen(load<vh>(x + k)) - mean) * factor * widen(load<vh>(a.weight + k)) +
                           widen(load<vh>(a.bias + k)));
}

// A token's key, rounded once.
static inline void index_key(const KeyWrite& a, int64_t t, float* wide, bf16* to) {
    layer_norm_row(a, a.k + t * a.row, wide);
    const float* angles = a.cos_sin + t * a.angle_row;
    const int64_t half = a.rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        float &first = wide[a.interleaved ? 2 * i : i], &second = wide[a.interleaved ? 2 * i + 1 : half + i];
        const float x = first, y = second;
        first = x * angles[i] - y * angles[half + i];
        second = y * angles[i] + x * angles[half + i];
    }
    for (int64_t k = 0; k < a.width; k += LANES) store(to + k, narrow(load<vf>(wide + k)));
}

// Encode a key as e4m3 over 2^ceil(log2(max(largest, 1e-4) / 448)), as DeepSeek-V3.2 does.
static inline void encode_key(const bf16* key, int64_t width, uint8_t* codes, uint8_t* scale) {
    const float power = power_above(std::max(largest(key, width), 1e-4f) / 448.0f);
    for (int64_t k = 0; k < width; k += LANES)
        store(codes + k, __builtin_convertvector(to_e4m3(widen(load<vh>(key + k)) / power), Codes));
    store(scale, power);
}

static void write_index_key(const KeyWrite& a, int threads) {
    const int64_t page_bytes = a.page_size * (a.coded ? a.width + (int64_t)sizeof(float) : 2 * a.width);
    Shortage shortage;
#pragma omp parallel for num_threads(threads) if (a.tokens * a.width > PARALLEL_WORK)
    for (int64_t t = 0; t < a.tokens; t++)
        shortage.within([&] {
            float* wide = scratch<25>().take<float>(2 * a.width);
            bf16* key = (bf16*)(wide + a.width);
            uint8_t* page = a.cache + a.slots[t] / a.page_size * page_bytes;
            const int64_t slot = a.slots[t] % a.page_size;
            index_key(a, t, wide, a.coded ? key : (bf16*)page + slot * a.width);
            if (a.coded)
                encode_key(key, a.width, page + slot * a.width,
                           page + a.page_size * a.width + slot * sizeof(float));
        });
    shortage.raise();
}

// --------------------------------------------------------------------------------------------- selection

// The best of what was offered, in the order in which it was: of what ties with the last one, some.
class Best {
 public:
    // Up to `most` of `offered`, in memory for size(most, offered) numbers.
    Best(int64_t most, int64_t offered, uint32_t* memory)
        : most_(most), capacity_(size(most, offered) / 2), keys_(memory), places_((int32_t*)memory + capacity_) {}

    static int64_t size(int64_t most, int64_t offered) {
        return 2 * (std::min(2 * most + KEYS, offered) + KEYS + LANES);
    }

    // Offer the first `count` of the scores of the places from `first` on.
    void offer(vf scores, int64_t count, int32_t first) {
        if (held_ > capacity_ - 2 * LANES) cut(most_ / 4);
        const vu key = ordered(scores);
        take(key, LANE + first, (key > floor_) & (vu)(LANE < (int32_t)count));
    }
    // What is held, as numbers that another one takes: how many, their keys, and their places.
    void save(uint32_t* to) const {
        *to++ = (uint32_t)held_;
        std::copy_n(places_, held_, std::copy_n(keys_, held_, to));
    }
    void merge(const uint32_t* from) {
        const int64_t count = *from++;
        if (held_ + count > capacity_ - LANES) cut();  // which reads whole vectors
        std::copy_n(from, count, keys_ + held_);
        std::copy_n(from + count, count, places_ + held_);
        held_ += count;
    }
    // Leave the best `most` and, for fewer steps of search, up to `more` of those that follow.
    void cut(int64_t more = 0) {
        const int64_t count = held_, wanted = most_ + more;
        if (count <= wanted) return;
        uint32_t least = 0;  // as large as it can be so that `most` are not below it
        int64_t enough = count;
        for (uint32_t bit = 1u << 31; bit && enough > wanted; bit /= 2)
            if (const int64_t some = at_least(least | bit); some >= most_) least |= bit, enough = some;
        int64_t spare = std::max<int64_t>(0, enough - wanted);  // of those that tie with the last one
        held_ = 0, floor_ = least;
        for (int64_t i = 0; i < count; i += LANES) {
            const vu key = load<vu>(keys_ + i);
            const vi place = load<vi>(places_ + i), left = LANE < (int32_t)(count - i);
            vi chosen = (key >= least) & left;
            const vi tied = (key == least) & left;
            for (int64_t j = 0; j < LANES && spare; j++) {
                spare -= tied[j] & 1;
                chosen[j] &= ~tied[j];
            }
            take(key, place, (vu)chosen);
        }
    }

    // Write the places, and -1 behind them.
    void write(int32_t* to) const {
        std::fill_n(std::copy_n(places_, held_, to), most_ - held_, -1);
    }

 private:
    // Numbers in the order of the scores, above 0; a NaN is beyond the infinity of its sign.
    static vu ordered(vf score) {
        const vu bits = (vu)score, key = (vi)bits < 0 ? ~bits : bits | 0x80000000u;
        return key ? key : vu{} + 1;
    }
    void take(vu key, vi place, vu chosen) {
#if defined(__AVX512F__)
        const __mmask16 mask = _mm512_test_epi32_mask((__m512i)chosen, (__m512i)chosen);
        store(keys_ + held_, _mm512_maskz_compress_epi32(mask, (__m512i)key));
        store(places_ + held_, _mm512_maskz_compress_epi32(mask, (__m512i)place));
        held_ += __builtin_popcount(mask);
#else
        for (int i = 0; i < LANES; i++) {
            keys_[held_] = key[i], places_[held_] = place[i];
            held_ += chosen[i] & 1;
        }
#endif
    }
    int64_t at_least(uint32_t key) const {
        int32_t count = 0;
        for (int64_t i = 0; i < held_; i++) count += keys_[i] >= key;
        return count;
    }

    static constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t most_, capacity_;
    uint32_t* const keys_;
    int32_t* const places_;
    int64_t held_ = 0;
    uint32_t floor_ = 0;
};

struct Select {
    Latent in;             // q [T, H, D], the index cache, tables and lengths; nothing of results
    const float* weights;  // [T, H] by rows
    int64_t weight_row;
    int32_t* out;  // [T, most] by rows
    int64_t out_row, most;

    bool coded() const { return in.layout.count; }
    int64_t panels() const { return (in.heads + LANES - 1) / LANES; }  // of a query
    int64_t seen(int64_t b, int64_t token) const {
        return std::max<int64_t>(0, in.kv_lens[b] - in.cu_q[b + 1] + token + 1);
    }
    // The scale of a key of a page-split cache.
    float scale(int64_t b, int64_t position) const {
        const uint8_t* page = (const uint8_t*)in.token(b, position - position % in.page_size);
        return load<float>(page + in.page_size * in.layout.bytes + position % in.page_size * sizeof(float));
    }
};

// Some queries of a request against a part of its keys. What is left of a part is saved and merged later.
struct SelectTask {
    int64_t request, token, tokens;
    int64_t part, parts, keys;  // keys of one part
    int64_t saved;              // where it is kept, or -1

    int64_t begin() const { return part * keys; }
    int64_t offered(int64_t seen) const { return std::max<int64_t>(0, std::min(keys, seen - begin())); }
};

constexpr int64_t SELECT_ROWS = 512, SELECT_TOKENS = 8, LEAST_SELECT = 1024;

// How much of `seen` keys is saved for a query of a task in parts: keys and places, and how many.
static int64_t saved_size(const Select& a, const SelectTask& task, int64_t seen) {
    return 1 + 2 * std::min(a.most, task.offered(seen));
}

static void plan_select(const Select& a, int threads, std::vector<SelectTask>& tasks, int64_t& saved) {
    const int64_t group = std::max<int64_t>(1, std::min(SELECT_TOKENS, SELECT_ROWS / (a.panels() * LANES)));
    int64_t work = 0;
    for (int64_t b = 0; b < a.in.requests; b++) work += (a.in.cu_q[b + 1] - a.in.cu_q[b]) * a.in.kv_lens[b];
    tasks.clear();
    saved = 0;
    for (int64_t b = 0; b < a.in.requests; b++)
        for (int64_t token = a.in.cu_q[b], end = a.in.cu_q[b + 1]; token < end; token += group) {
            const int64_t tokens = std::min(group, end - token), keys = a.seen(b, token + tokens - 1);
            const int64_t least = std::max(std::max(a.most, LEAST_SELECT), work / (4 * threads * tokens) + 1);
            const int64_t parts = threads == 1 ? 1 : std::max<int64_t>(1, keys / least);
            const int64_t size = ((keys + parts - 1) / parts + LANES - 1) / LANES * LANES;
            for (int64_t part = 0; part < parts; part++) {
                const SelectTask task = {b, token, tokens, part, parts, size, parts > 1 ? saved : -1};
                tasks.push_back(task);
                for (int64_t t = 0; t < tokens && parts > 1; t++) saved += saved_size(a, task, a.seen(b, token + t));
            }
        }
}

// What scores of a task are made from: its queries, whose heads are filled up with zeros to whole panels, and
// their weights.
struct Queries {
    Row* rows;
    float* weights;  // [tokens][panels][16]

    Queries(const Select& a, const SelectTask& task)
        : rows(scratch<20>().take<Row>(task.tokens * a.panels() * LANES)),
          weights(scratch<27>().take<float>(task.tokens * a.panels() * LANES + a.in.width)) {
        const int64_t padded = a.panels() * LANES;
        float* const zeros = weights + task.tokens * padded;
        std::memset(weights, 0, (task.tokens * padded + a.in.width) * sizeof(float));
        for (int64_t t = 0; t < task.tokens; t++) {
            const int64_t token = task.token + t, seen = a.seen(task.request, token);
            std::memcpy(weights + t * padded, a.weights + token * a.weight_row, a.in.heads * sizeof(float));
            for (int64_t h = 0; h < padded; h++)
                rows[t * padded + h] = {
                    h < a.in.heads ? a.in.q + token * a.in.q_token + h * a.in.q_head : (const bf16*)zeros, nullptr,
                    nullptr, seen};
        }
    }
};

// Sixteen sums of the lanes of a vector each.
static inline vf add_lanes(const vf* rows) {
#if defined(__AVX512F__)
    __m512 a[LANES];
    for (int i = 0; i < LANES; i++) a[i] = (__m512)rows[i];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d x = (__m512d)a[2 * i], y = (__m512d)a[2 * i + 1];
        a[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(x, y), (__m512)_mm512_unpackhi_pd(x, y));
    }
    for (int left = 2; left; left /= 2)
        for (int i = 0; i < left; i++)
            a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
    return (vf)a[0];
#else
    vu bits[LANES];
    float turned[LANES * LANES];
    std::memcpy(bits, rows, sizeof bits);
    transpose(bits, (uint32_t*)turned);
    vf total = load<vf>(turned);
    for (int64_t i = 1; i < LANES; i++) total += load<vf>(turned + i * LANES);
    return total;
#endif
}
// max(0, x); a NaN counts as 0, such as infinity times zeros that fill up.
static inline vf positive(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)x, _mm512_setzero_ps());
#else
    return maximum(x, vf{});
#endif
}
// Sums over panels of weights * max(0, scores [panels][count][16]), lane by lane: rows [count].
template <int PANELS>
[[gnu::always_inline]] static inline void add_panels(const float* scores, int64_t column, int64_t panels,
                                                     const float* weights, vf* row, int64_t count) {
    vf weight[PANELS ? PANELS : 1];  // which the compiler would load again after each store
    for (int p = 0; p < PANELS; p++) weight[p] = load<vf>(weights + p * LANES);
    for (int64_t i = 0; i < count; i++, scores += LANES) {
        vf sum = {};
        for (int64_t p = 0; p < (PANELS ? PANELS : panels); p++)
            sum += positive(load<vf>(scores + p * column)) * (PANELS ? weight[p] : load<vf>(weights + p * LANES));
        row[i] = sum;
    }
}

// Offer the scores of all keys of a task to the best of each of its queries: sums over PANELS, or panels(), and their lanes of
// weights * max(0, score).
template <int PANELS>
static void score_keys(const Select& a, const SelectTask& task, std::vector<Best>& best) {
    const int64_t panels = PANELS ? PANELS : a.panels(), last = a.seen(task.request, task.token + task.tokens - 1);
    const Queries queries(a, task);
    Attending products(queries.rows, task.tokens * panels * LANES, a.in.width, 0, 1, a.in.width, a.in.layout);
    vf rows[LANES] = {};
    const auto offer = [&](int64_t t, int64_t key, int64_t count) __attribute__((always_inline)) {
        vf sums = add_lanes(rows);
        const int64_t seen = std::min(count, a.seen(task.request, task.token + t) - key);
        for (int64_t j = 0; j < seen && a.coded(); j++) sums[j] *= a.scale(task.request, key + j);
        best[t].offer(sums, seen, (int32_t)key);
    };
    const auto add = [&](int64_t p, int64_t key, auto at, auto count, const float* scores, int64_t column,
                         auto ends) __attribute__((always_inline)) {
        for (int64_t i = 0; i < count; i += LANES, scores += LANES * LANES) {
            add_panels<PANELS>(scores, column, panels, queries.weights + p * LANES, rows + at,
                               std::min<int64_t>(LANES, count - i));
            if (ends) offer(p / panels, key + i, std::min<int64_t>(LANES, at + count - i));
        }
    };
    const bf16* keys[2][KEYS];
    const int64_t end = std::min(task.begin() + task.keys, last);
    if (task.begin() < end) find_keys(a.in, task.request, task.begin(), end, keys[0]);
    bool turn = false;
    for (int64_t first = task.begin(); first < end; first += KEYS, turn = !turn) {
        const bool more = first + KEYS < end;
        if (more) find_keys(a.in, task.request, first + KEYS, end, keys[!turn]);
        products.score<PANELS>(keys[turn], first, std::min(KEYS, end - first), more ? keys[!turn] : nullptr, panels, add);
    }
    products.finish_scores(add);
}

// Make the best of each query of a task, of what a part of its keys or all of them offer.
static std::vector<Best>& open_best(const Select& a, const SelectTask& task, bool merged) {
    static thread_local std::vector<Best> best;
    best.clear();
    int64_t size = 0;
    const auto offered = [&](int64_t t) {
        const int64_t seen = a.seen(task.request, task.token + t);
        return merged ? seen : task.offered(seen);
    };
    for (int64_t t = 0; t < task.tokens; t++) size += Best::size(a.most, offered(t));
    uint32_t* memory = scratch<29>().take<uint32_t>(size);
    for (int64_t t = 0; t < task.tokens; t++) {
        best.emplace_back(a.most, offered(t), memory);
        memory += Best::size(a.most, offered(t));
    }
    return best;
}

// Select for the queries of a task, or save what its part of the keys gave. A query that sees no more keys than are
// selected needs no scores.
static void select_task(const Select& a, const SelectTask& task, uint32_t* saved) {
    if (a.seen(task.request, task.token + task.tokens - 1) <= a.most) {
        for (int64_t token = task.token; token < task.token + task.tokens; token++) {
            int32_t *to = a.out + token * a.out_row, *end = to + a.seen(task.request, token);
            std::iota(to, end, 0);
            std::fill(end, to + a.most, -1);
        }
        return;
    }
    std::vector<Best>& best = open_best(a, task, false);
    const auto score = a.panels() == 4 ? score_keys<4> : a.panels() == 2 ? score_keys<2> : score_keys<0>;
    score(a, task, best);
    if (task.parts > 1) saved += task.saved;
    for (int64_t t = 0; t < task.tokens; t++) {
        best[t].cut();
        if (task.parts == 1)
            best[t].write(a.out + (task.token + t) * a.out_row);
        else
            best[t].save(saved), saved += saved_size(a, task, a.seen(task.request, task.token + t));
    }
}

// Merge the parts that begin with this task.
static void merge_parts(const Select& a, const SelectTask* parts, const uint32_t* saved) {
    std::vector<Best>& best = open_best(a, *parts, true);
    for (const SelectTask* task = parts; task < parts + parts->parts; task++) {
        const uint32_t* from = saved + task->saved;
        for (int64_t t = 0; t < task->tokens; t++) {
            best[t].merge(from);
            from += saved_size(a, *task, a.seen(task->request, task->token + t));
        }
    }
    for (int64_t t = 0; t < parts->tokens; t++) {
        best[t].cut();
        best[t].write(a.out + (parts->token + t) * a.out_row);
    }
}

static void select_latents(const Select& a, int threads) {
    static thread_local std::vector<SelectTask> planned;
    int64_t size;
    plan_select(a, threads, planned, size);
    uint32_t* saved = scratch<30>().take<uint32_t>(size);
    const std::vector<SelectTask>& tasks = planned;  // of this thread, for all
    const int64_t count = (int64_t)tasks.size();
    Shortage shortage;
#pragma omp parallel num_threads(threads)
    {
        const TileSession session;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) shortage.within([&] { select_task(a, tasks[i], saved); });
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < (size ? count : 0); i++)
            if (tasks[i].parts > 1 && !tasks[i].part) shortage.within([&] { merge_parts(a, &tasks[i], saved); });
    }
    shortage.raise();
}

// ------------------------------------------------------------------------------------- sparse attention

// Attend to selected keys: each query becomes a request of its own, with as many keys as it selects.
static void sparse_attention(Latent a, int64_t tokens, int64_t most, int threads) {
    int32_t* const numbers = scratch<31>().take<int32_t>(3 * tokens + 1);
    int32_t *const owner = numbers, *const lengths = owner + tokens, *const starts = lengths + tokens;
    for (int64_t b = 0; b < a.requests; b++) std::fill(owner + a.cu_q[b], owner + a.cu_q[b + 1], (int32_t)b);
    for (int64_t t = 0; t < tokens; t++) {
        const int32_t* row = a.selection + t * a.selection_row;
        lengths[t] = (int32_t)(std::find(row, row + most, -1) - row);
    }
    std::iota(starts, starts + tokens + 1, 0);
    a.owner = owner, a.kv_lens = lengths, a.cu_q = starts, a.requests = tokens, a.rows = 128;
    latent_attention(a, threads);
}

}  // namespace mla
