// Ordinary multi-head attention over ragged segments. A task is a run of queries of one head of one segment;
// its keys and values are copied block by block, since rows of one head lie far apart and on the same cache
// sets.
#pragma once
#include <vector>

#include "attention_dispatch.h"

namespace mla {

struct Rows3 {  // [tokens, heads, width] by strides
    const bf16* data;
    int64_t token, head;
};

struct Expanded {
    Rows3 q, k, v;
    int64_t heads, key_width, value_width;
    float scale;
    bf16* out;
    int64_t out_token, out_head;
    float* lse;
    int64_t lse_token, lse_head;
    const int64_t *query_lens, *kv_lens;
    int64_t segments;
    bool causal;
};

struct ExpandedTask {
    int64_t query, queries;  // first token and count
    int64_t key, keys;       // of the whole segment
    int64_t seen;            // keys the first query sees
    int64_t head;
};

static void plan_expanded(const Expanded& a, std::vector<ExpandedTask>& tasks) {
    tasks.clear();
    const int64_t most = std::max<int64_t>(LANES, (int64_t)(32 << 10) / a.value_width / LANES * LANES);
    int64_t query = 0, key = 0;
    for (int64_t s = 0; s < a.segments; query += a.query_lens[s], key += a.kv_lens[s], s++) {
        const int64_t queries = a.query_lens[s], keys = a.kv_lens[s];
        for (int64_t first = 0; first < queries; first += most)
            for (int64_t head = 0; head < a.heads; head++)
                tasks.push_back({query + first, std::min(most, queries - first), key, keys,
                                 a.causal ? keys - queries + first + 1 : keys, head});
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const ExpandedTask& a, const ExpandedTask& b) {
        return a.queries * a.seen > b.queries * b.seen;
    });
}

static Row* expanded_rows(const Expanded& a, const ExpandedTask& t) {
    Row* rows = scratch<20>().take<Row>(t.queries);
    for (int64_t i = 0; i < t.queries; i++) {
        const int64_t token = t.query + i;
        rows[i] = {a.q.data + token * a.q.token + t.head * a.q.head,
                   a.out + token * a.out_token + t.head * a.out_head,
                   a.lse + token * a.lse_token + t.head * a.lse_head, a.causal ? t.seen + i : t.seen};
    }
    return rows;
}

// Copy rows next to each other, `pitch` elements apart, and point to the copies.
static void gather_rows(const bf16** rows, int64_t count, int64_t width, bf16* to, int64_t pitch) {
    for (int64_t j = 0; j < count; j++, to += pitch) {
        std::memcpy(to, rows[j], width * sizeof(bf16));
        rows[j] = to;
    }
}

static void expanded_task(const Expanded& a, const ExpandedTask& t) {
    const int64_t pitch = a.key_width + a.value_width + 2 * LANES;  // never a power of two
    const Layout plain = {};
    Attending attention(expanded_rows(a, t), t.queries, a.key_width, a.value_width, a.scale, pitch, plain);
    bf16* copy = Attending::COPIES ? nullptr : scratch<22>().take<bf16>(KEYS * pitch);
    const bf16 *keys[KEYS], *values[KEYS];
    const int64_t end = attention.most();
    for (int64_t first = 0; first < end; first += KEYS) {
        const int64_t count = std::min(KEYS, end - first), token = t.key + first;
        for (int64_t j = 0; j < count; j++) {
            keys[j] = a.k.data + (token + j) * a.k.token + t.head * a.k.head;
            values[j] = a.v.data + (token + j) * a.v.token + t.head * a.v.head;
        }
        if (!Attending::COPIES) {
            gather_rows(keys, count, a.key_width, copy, pitch);
            gather_rows(values, count, a.value_width, copy + a.key_width, pitch);
        }
        attention.attend(keys, values, first, count);
    }
    attention.finish();
}

static void expanded_attention(const Expanded& a, int threads) {
    static thread_local std::vector<ExpandedTask> tasks;
    plan_expanded(a, tasks);
    const ExpandedTask* all = tasks.data();
    const int64_t count = (int64_t)tasks.size();
    Shortage shortage;
#pragma omp parallel num_threads(threads)
    {
        const TileSession session;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) shortage.within([&] { expanded_task(a, all[i]); });
    }
    shortage.raise();
}

}  // namespace mla
