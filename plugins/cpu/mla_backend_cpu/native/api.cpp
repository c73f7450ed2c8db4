// The C interface that Python calls with raw addresses. Shapes have been checked there.
#include "expanded.h"
#include "gemm.h"
#include "latent.h"
#include "pointwise.h"

using namespace mla;

#pragma GCC visibility push(default)
extern "C" {

void mla_pack(const bf16* weight, int64_t group, int64_t row, int64_t column, int64_t groups, int64_t outputs,
              int64_t inputs, bf16* packed, int threads) {
    const int64_t panels = panels_of(outputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < groups * panels; task++) {
        int64_t g = task / panels, first = task % panels * LANES;
        pack_panel(weight + g * group + first * row, row, column, std::min<int64_t>(LANES, outputs - first),
                   inputs, packed + task * LANES * inputs);
    }
}

void mla_unpack(const bf16* packed, int64_t groups, int64_t outputs, int64_t inputs, bf16* weight,
                int threads) {
    const int64_t panels = panels_of(outputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < groups * panels; task++) {
        int64_t g = task / panels, first = task % panels * LANES;
        unpack_panel(packed + task * LANES * inputs, std::min<int64_t>(LANES, outputs - first), inputs,
                     weight + (g * outputs + first) * inputs);
    }
}

void mla_linear(const bf16* x, int64_t x_row, const bf16* packed, const bf16* bias, bf16* out,
                int64_t out_row, int64_t tokens, int64_t inputs, int64_t outputs, int wide, int threads) {
    linear(x, x_row, packed, inputs, {out, out_row, bias, outputs}, tokens, wide, threads);
}

void mla_batched_linear(const bf16* x, int64_t x_token, int64_t x_head, const bf16* packed, bf16* out,
                        int64_t out_token, int64_t out_head, int64_t tokens, int64_t heads, int64_t inputs,
                        int64_t outputs, int wide, int threads) {
    batched_linear(x, x_token, x_head, packed, inputs, out, out_token, out_head, outputs, tokens, heads, wide,
                   threads);
}

void mla_latent_attention(const bf16* q, int64_t q_token, int64_t q_head, const bf16* cache,
                          const int32_t* block_table, int64_t table_row, const int32_t* kv_lens,
                          const int32_t* cu_q, int64_t requests, int64_t page_size, int64_t heads,
                          int64_t width, int64_t latent, float scale, bf16* out, int64_t out_token,
                          int64_t out_head, float* lse, int64_t lse_token, int64_t lse_head, int threads) {
    latent_attention(
        {q,     q_token, q_head, cache, block_table, table_row, kv_lens,  cu_q, requests,  page_size,
         heads, width,   latent, scale, out,         out_token, out_head, lse,  lse_token, lse_head},
        threads);
}

void mla_expanded_attention(const bf16* q, int64_t q_token, int64_t q_head, const bf16* k, int64_t k_token,
                            int64_t k_head, const bf16* v, int64_t v_token, int64_t v_head, int64_t heads,
                            int64_t key_width, int64_t value_width, float scale, bf16* out, int64_t out_token,
                            int64_t out_head, float* lse, int64_t lse_token, int64_t lse_head,
                            const int64_t* query_lens, const int64_t* kv_lens, int64_t segments, int causal,
                            int threads) {
    expanded_attention({{q, q_token, q_head},
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
                        causal != 0},
                       threads);
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

void mla_write_latent(const bf16* kv_a, int64_t row, const bf16* weight, float eps, const float* cos_sin,
                      int64_t angle_row, const int64_t* slots, bf16* cache, int64_t tokens, int64_t latent,
                      int64_t rotary, int interleaved, int threads) {
    write_latent(
        {kv_a, row, weight, eps, cos_sin, angle_row, slots, cache, tokens, latent, rotary, interleaved != 0},
        threads);
}

// 1 where bf16 pairs are multiplied by an instruction of their own.
int mla_dot_bf16() {
    return MLA_DOT_BF16;
}

}  // extern "C"
#pragma GCC visibility pop
