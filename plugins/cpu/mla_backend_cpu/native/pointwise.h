// RMSNorm, rotation, and the cache write that joins them; fp32 inside, rounded once.
#pragma once
#include <algorithm>
#include <cmath>

#include "formats.h"
#include "simd.h"
#include "work_queue.h"

namespace mla {

// x / sqrt(mean(x^2) + eps) * weight
static inline void norm_row(const bf16* x, const bf16* weight, float eps, int64_t width, bf16* out) {
    vf squares = {};
    for (int64_t k = 0; k < width; k += LANES) {
        vf value = widen(load<vh>(x + k));
        squares += value * value;
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += squares[i];
    const float factor = 1 / std::sqrt(sum / width + eps);
    for (int64_t k = 0; k < width; k += LANES)
        store(out + k, narrow(widen(load<vh>(x + k)) * factor * widen(load<vh>(weight + k))));
}

// Rotate `width` channels by the cosines and then sines in `angles`; out may be x.
static inline void rotate_row(const bf16* x, const float* angles, int64_t width, bool interleaved,
                              bf16* out) {
    const int64_t half = width / 2;
    for (int64_t k = 0; k < half; k += LANES) {
        const vf cosine = load<vf>(angles + k), sine = load<vf>(angles + half + k);
        if (interleaved) {
            const vu pairs = load<vu>(x + 2 * k);
            const vf a = low_half(pairs), b = high_half(pairs);
            store(out + 2 * k, pair_up(narrow(a * cosine - b * sine), narrow(a * sine + b * cosine)));
        } else {
            const vf a = widen(load<vh>(x + k)), b = widen(load<vh>(x + half + k));
            store(out + k, narrow(a * cosine - b * sine));
            store(out + half + k, narrow(a * sine + b * cosine));
        }
    }
}

static void rms_norm(const bf16* x, int64_t x_row, const bf16* weight, float eps, bf16* out, int64_t out_row,
                     int64_t tokens, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL_WORK)
    for (int64_t t = 0; t < tokens; t++) norm_row(x + t * x_row, weight, eps, width, out + t * out_row);
}

struct Rotation {
    const bf16* x;
    int64_t x_token, x_head;
    const float* cos_sin;
    int64_t angle_row;
    bf16* out;
    int64_t out_token, out_head;
    int64_t tokens, heads, width;
    bool interleaved;
};

static void rotate(const Rotation& a, int threads) {
#pragma omp parallel for num_threads(threads) if (a.tokens * a.heads * a.width > PARALLEL_WORK)
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t h = 0; h < a.heads; h++)
            rotate_row(a.x + t * a.x_token + h * a.x_head, a.cos_sin + t * a.angle_row, a.width,
                       a.interleaved, a.out + t * a.out_token + h * a.out_head);
}

struct Write {
    const bf16* kv_a;
    int64_t row;
    const bf16* weight;
    float eps;
    const float* cos_sin;
    int64_t angle_row;
    const int64_t* slots;
    uint8_t* cache;  // rows of layout.bytes
    Layout layout;
    int64_t tokens, latent, rotary;
    bool interleaved;
};

// What a token's row of the cache holds, before it is encoded.
static inline void latent_row(const Write& a, int64_t t, bf16* to) {
    norm_row(a.kv_a + t * a.row, a.weight, a.eps, a.latent, to);
    rotate_row(a.kv_a + t * a.row + a.latent, a.cos_sin + t * a.angle_row, a.rotary, a.interleaved,
               to + a.latent);
}

static void write_latent(const Write& a, int threads) {
    const int64_t width = a.latent + a.rotary;
    Shortage shortage;
#pragma omp parallel for num_threads(threads) if (a.tokens * width > PARALLEL_WORK)
    for (int64_t t = 0; t < a.tokens; t++) {
        uint8_t* to = a.cache + a.slots[t] * a.layout.bytes;
        if (!a.layout.count) {
            latent_row(a, t, (bf16*)to);
            continue;
        }
        shortage.within([&] {
            const bf16* row = scratch<25>().take<bf16>(width);
            latent_row(a, t, (bf16*)row);
            for (const Run& run : a.layout) encode_run(a.layout, run, row, to), row += run.columns;
        });
    }
    shortage.raise();
}

}  // namespace mla
