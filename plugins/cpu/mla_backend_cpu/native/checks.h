// Indices and lengths that decide where memory is read and written are checked once per call. A fault is a
// sentence, valid until the same thread's next one; null if there is none.
#pragma once
#include <cstdarg>
#include <cstdio>

#include "expanded.h"
#include "indexer.h"

namespace mla {

[[gnu::format(printf, 1, 2)]] static const char* fault(const char* format, ...) {
    static thread_local char sentence[256];
    va_list values;
    va_start(values, format);
    std::vsnprintf(sentence, sizeof sentence, format, values);
    va_end(values);
    return sentence;
}

// The first of `count` indices that is not below `limit`, or -1. All are checked, which vectorizes.
template <class T>
static int64_t first_outside(const T* indices, int64_t count, int64_t limit) {
    bool outside = false;
    for (int64_t i = 0; i < count; i++) outside |= indices[i] < 0 || indices[i] >= limit;
    if (!outside) return -1;
    return std::find_if(indices, indices + count, [&](T x) { return x < 0 || x >= limit; }) - indices;
}

// `table_columns`, `pages` and `tokens` are what block_table, the cache and q hold.
static const char* check_latent(const Latent& a, int64_t table_columns, int64_t pages, int64_t tokens) {
    if (a.cu_q[0] != 0 || a.cu_q[a.requests] != tokens)
        return fault("cu_q runs from %d to %d, but q has %lld tokens.", a.cu_q[0], a.cu_q[a.requests],
                     (long long)tokens);
    for (int64_t b = 0; b < a.requests; b++) {
        if (a.cu_q[b + 1] < a.cu_q[b])
            return fault("cu_q falls from %d to %d after request %lld.", a.cu_q[b], a.cu_q[b + 1],
                         (long long)b);
        const int64_t used = ((int64_t)a.kv_lens[b] + a.page_size - 1) / a.page_size;
        if (a.kv_lens[b] < 0 || used > table_columns)
            return fault(
                "kv_lens names %d tokens for request %lld, whose row of block_table has room for %lld.",
                a.kv_lens[b], (long long)b, (long long)(table_columns * a.page_size));
        const int32_t* row = a.block_table + b * a.table_row;
        const int64_t bad = first_outside(row, used, pages);
        if (bad >= 0)
            return fault(
                "block_table names page %d in column %lld of request %lld, but the cache has %lld pages.",
                row[bad], (long long)bad, (long long)b, (long long)pages);
    }
    return nullptr;
}

// What is selected must be in the request, and stand before what is not.
static const char* check_selection(const Latent& a, int64_t most) {
    for (int64_t b = 0; b < a.requests; b++)
        for (int64_t t = a.cu_q[b]; t < a.cu_q[b + 1]; t++) {
            const int32_t* row = a.selection + t * a.selection_row;
            const int64_t count = std::find(row, row + most, -1) - row;
            const int64_t bad = first_outside(row, count, (int64_t)a.kv_lens[b]);
            if (bad >= 0)
                return fault("selection names position %d for token %lld, whose request has %d.", row[bad],
                             (long long)t, a.kv_lens[b]);
            if (!std::all_of(row + count, row + most, [](int32_t x) { return x == -1; }))
                return fault("selection of token %lld names a position behind a -1.", (long long)t);
        }
    return nullptr;
}

static const char* check_slots(const int64_t* slots, int64_t tokens, int64_t all) {
    const int64_t bad = first_outside(slots, tokens, all);
    if (bad < 0) return nullptr;
    return fault("slots names slot %lld for token %lld, but the cache has %lld.", (long long)slots[bad],
                 (long long)bad, (long long)all);
}

// `lengths` of `segments` must fill the `rows` of a tensor.
static const char* check_lengths(const char* name, const int64_t* lengths, int64_t segments,
                                 const char* tensor, int64_t rows) {
    int64_t total = 0;
    for (int64_t s = 0; s < segments; s++) {
        if (lengths[s] < 0 || lengths[s] > rows)
            return fault("%s names %lld tokens for segment %lld, but %s has %lld.", name,
                         (long long)lengths[s], (long long)s, tensor, (long long)rows);
        total += lengths[s];
    }
    if (total == rows) return nullptr;
    return fault("%s adds up to %lld tokens, but %s has %lld.", name, (long long)total, tensor,
                 (long long)rows);
}

static const char* check_expanded(const Expanded& a, int64_t queries, int64_t keys) {
    const char* wrong = check_lengths("query_lens", a.query_lens, a.segments, "q", queries);
    return wrong ? wrong : check_lengths("kv_lens", a.kv_lens, a.segments, "k", keys);
}

}  // namespace mla
