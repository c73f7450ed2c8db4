// The C interface that Python calls with raw addresses. Shapes have been checked there; functions that follow
// indices, or keep memory, return a sentence if an index is invalid or memory runs out, else null.
#include "checks.h"
#include "gemm_dispatch.h"
#include "packing.h"
#include "recorded.h"

using namespace mla;

#pragma GCC visibility push(default)
extern "C" {

void mla_pack(const bf16* weight, int64_t group, int64_t row, int64_t column, int64_t groups, int64_t outputs,
              int64_t inputs, bf16* packed, int threads) {
    pack(weight, group, row, column, groups, outputs, inputs, packed, threads);
}
void mla_pack_fp32(const float* weight, int64_t group, int64_t row, int64_t column, int64_t groups,
                   int64_t outputs, int64_t inputs, float* packed, int threads) {
    pack(weight, group, row, column, groups, outputs, inputs, packed, threads);
}

void mla_unpack(const bf16* packed, int64_t groups, int64_t outputs, int64_t inputs, bf16* weight,
                int threads) {
    unpack(packed, groups, outputs, inputs, weight, threads);
}
void mla_unpack_fp32(const float* packed, int64_t groups, int64_t outputs, int64_t inputs, float* weight,
                     int threads) {
    unpack(packed, groups, outputs, inputs, weight, threads);
}

const char* mla_linear(const bf16* x, int64_t x_token, int64_t x_head, const bf16* packed, const bf16* bias,
                       bf16* out, int64_t out_token, int64_t out_head, int64_t tokens, int64_t heads,
                       int64_t inputs, int64_t outputs, int wide, int threads) {
    const Product<bf16, bf16> p = {
        x, {x_token, x_head}, packed, inputs, {out, out_token, bias, outputs}, out_head, tokens, heads};
    return attempt([&] { multiply(p, wide, threads); });
}
const char* mla_linear_fp32(const float* x, int64_t x_token, int64_t x_head, const float* packed,
                            const float* bias, float* out, int64_t out_token, int64_t out_head,
                            int64_t tokens, int64_t heads, int64_t inputs, int64_t outputs, int wide,
                            int threads) {
    const Product<float, float> p = {
        x, {x_token, x_head}, packed, inputs, {out, out_token, bias, outputs}, out_head, tokens, heads};
    return attempt([&] { multiply(p, wide, threads); });
}

const char* mla_latent_attention(const bf16* q, int64_t q_token, int64_t q_head, int64_t tokens,
                                 const uint8_t* cache, const Run* runs, int64_t run_count,
                                 int64_t token_bytes, float fixed, int64_t pages, const int32_t* block_table,
                                 int64_t table_row, int64_t table_columns, const int32_t* kv_lens,
                                 const int32_t* cu_q, int64_t requests, int64_t page_size, int64_t heads,
                                 int64_t width, int64_t latent, float scale, bf16* out, int64_t out_token,
                                 int64_t out_head, float* lse, int64_t lse_token, int64_t lse_head,
                                 const int32_t* selection, int64_t selection_row, int64_t most, int threads) {
    const Latent a = {q,
                      q_token,
                      q_head,
                      cache,
                      {runs, run_count, token_bytes, fixed},
                      block_table,
                      table_row,
                      kv_lens,
                      cu_q,
                      requests,
                      page_size,
                      heads,
                      width,
                      latent,
                      scale,
                      out,
                      out_token,
                      out_head,
                      lse,
                      lse_token,
                      lse_head,
                      most < 0 ? nullptr : selection,  // fewer than none: all are attended
                      selection_row};
    if (const char* wrong = check_latent(a, table_columns, pages, tokens)) return wrong;
    if (most < 0) return attempt([&] { latent_attention(a, threads); });
    if (const char* wrong = check_selection(a, most)) return wrong;
    return attempt([&] { sparse_attention(a, tokens, most, threads); });
}

const char* mla_expanded_attention(const bf16* q, int64_t q_token, int64_t q_head, int64_t queries,
                                   const bf16* k, int64_t k_token, int64_t k_head, int64_t keys,
                                   const bf16* v, int64_t v_token, int64_t v_head, int64_t heads,
                                   int64_t key_width, int64_t value_width, float scale, bf16* out,
                                   int64_t out_token, int64_t out_head, float* lse, int64_t lse_token,
                                   int64_t lse_head, const int64_t* query_lens, const int64_t* kv_lens,
                                   int64_t segments, int causal, int threads) {
    const Expanded a = {{q, q_token, q_head},
                        {k, k_token, k_head},
                        {v, v_token, v_head},
                        heads,
                        key_width,
                        value_width,
                        scale,
                        out,
                        out_token,
                        out_head,
                        lse,
                        lse_token,
                        lse_head,
                        query_lens,
                        kv_lens,
                        segments,
                        causal != 0};
    if (const char* wrong = check_expanded(a, queries, keys)) return wrong;
    return attempt([&] { expanded_attention(a, threads); });
}

void mla_rms_norm(const bf16* x, int64_t x_row, const bf16* weight, float eps, bf16* out, int64_t out_row,
                  int64_t tokens, int64_t width, int threads) {
    rms_norm(x, x_row, weight, eps, out, out_row, tokens, width, threads);
}

void mla_rotate(const bf16* x, int64_t x_token, int64_t x_head, const float* cos_sin, int64_t angle_row,
                bf16* out, int64_t out_token, int64_t out_head, int64_t tokens, int64_t heads, int64_t width,
                int interleaved, int threads) {
    rotate({x, x_token, x_head, cos_sin, angle_row, out, out_token, out_head, tokens, heads, width,
            interleaved != 0},
           threads);
}

const char* mla_write_latent(const bf16* kv_a, int64_t row, const bf16* weight, float eps,
                             const float* cos_sin, int64_t angle_row, const int64_t* slots, uint8_t* cache,
                             const Run* runs, int64_t run_count, int64_t token_bytes, float fixed,
                             int64_t cache_slots, int64_t tokens, int64_t latent, int64_t rotary,
                             int interleaved, int threads) {
    const Write a = {kv_a,      row,   weight,
                     eps,       cos_sin, angle_row,
                     slots,     cache, {runs, run_count, token_bytes, fixed},
                     tokens,    latent, rotary,
                     interleaved != 0};
    if (const char* wrong = check_slots(slots, tokens, cache_slots)) return wrong;
    return attempt([&] { write_latent(a, threads); });
}

const char* mla_write_index_key(const bf16* k, int64_t row, const bf16* weight, const bf16* bias, float eps,
                                const float* cos_sin, int64_t angle_row, const int64_t* slots, uint8_t* cache,
                                int64_t pages, int64_t page_size, int coded, int64_t tokens, int64_t width,
                                int64_t rotary, int interleaved, int threads) {
    const KeyWrite a = {k,     row,       weight,     bias,   eps,   cos_sin, angle_row,
                        slots, cache, page_size, coded != 0, tokens, width, rotary,  interleaved != 0};
    if (const char* wrong = check_slots(slots, tokens, pages * page_size)) return wrong;
    return attempt([&] { write_index_key(a, threads); });
}

const char* mla_select_latents(const bf16* q, int64_t q_token, int64_t q_head, int64_t tokens,
                               const float* weights, int64_t weight_row, const uint8_t* cache, int coded,
                               int64_t pages, int64_t page_size, const int32_t* block_table,
                               int64_t table_row, int64_t table_columns, const int32_t* kv_lens,
                               const int32_t* cu_q, int64_t requests, int64_t heads, int64_t width,
                               int32_t* out, int64_t out_row, int64_t most, int threads) {
    const Run codes = {width, E4M3_FIXED, 0, 0};  // whose scales are not in their rows
    Latent in = {q, q_token, q_head, cache, {&codes, coded, coded ? width : 2 * width, 1}};
    in.block_table = block_table, in.table_row = table_row, in.kv_lens = kv_lens, in.cu_q = cu_q;
    in.requests = requests, in.page_size = page_size, in.heads = heads, in.width = width;
    in.page_bytes = page_size * (in.layout.bytes + (coded ? (int64_t)sizeof(float) : 0));
    if (const char* wrong = check_latent(in, table_columns, pages, tokens)) return wrong;
    const Select a = {in, weights, weight_row, out, out_row, most};
    return attempt([&] { select_latents(a, threads); });
}

// Put memory that was allocated elsewhere on huge pages: what is in use by now, and what will be.
void mla_huge_pages(void* data, int64_t bytes) {
    want_huge_pages(data, bytes);
    make_huge_pages(data, bytes);
}

// How a function above is called from a record; null if it is never recorded.
const void* mla_recorded(const char* name) {
    static const std::pair<const char*, Recorded> functions[] = {
        {"mla_linear", Recording<mla_linear>::run},
        {"mla_latent_attention", Recording<mla_latent_attention>::run},
        {"mla_rms_norm", Recording<mla_rms_norm>::run},
        {"mla_rotate", Recording<mla_rotate>::run},
        {"mla_write_latent", Recording<mla_write_latent>::run},
        {"mla_write_index_key", Recording<mla_write_index_key>::run},
        {"mla_select_latents", Recording<mla_select_latents>::run},
    };
    for (const auto& [known, run] : functions)
        if (!std::strcmp(known, name)) return (const void*)run;
    return nullptr;
}

// Make `count` recorded calls in order. Stops at the first invalid one and returns its fault, else null.
const char* mla_run_recorded(const int64_t* records, int64_t count, int threads) {
    return run_recorded(records, count, threads);
}

// 1 where bf16 pairs are multiplied by an instruction of their own.
int mla_dot_bf16() {
    return MLA_DOT_BF16;
}

// 1 where products are made by tiles.
int mla_tiles() {
    return MLA_TILES;
}

}  // extern "C"
#pragma GCC visibility pop
