// y = x W^T with W in panels, one vector of pairs at a time. AVX-512-BF16 multiplies such a vector as it is;
// elsewhere its halves are widened.
#pragma once
#include <utility>

#include "memory.h"
#include "panels.h"

namespace mla {

// What a kernel reads of x: bf16 pairs as they are, or values widened beforehand.
struct Pairs {
    typedef bf16 Value;
    static constexpr bool FOUR_PANELS = true;  // ten loads for 24 products; two panels need sixteen for 28
    template <int NR>
    static inline void step(vf (&sum)[NR], const vu (&b)[NR], const bf16* a) {
        uint32_t pair;
        std::memcpy(&pair, a, 4);
        for (int j = 0; j < NR; j++) sum[j] = dot(sum[j], b[j], pair);
    }
};
struct Wide {
    typedef float Value;
    static constexpr bool FOUR_PANELS = false;  // the widened weights would not fit the registers
    template <int NR>
    static inline void step(vf (&sum)[NR], const vu (&b)[NR], const float* a) {
        for (int j = 0; j < NR; j++) sum[j] += low_half(b[j]) * a[0];
        for (int j = 0; j < NR; j++) sum[j] += high_half(b[j]) * a[1];
    }
};

// A stretch of the inputs. Sums of all but the last one are kept in `partial`, [tokens, outputs] of the task,
// so that the weights and tokens of a stretch fit the first-level cache.
struct Stretch {
    int64_t begin, end, inputs;
    float* partial;  // null: one stretch is all
    int64_t row;

    bool first() const { return begin == 0; }
    bool last() const { return end == inputs; }
};

// MR tokens times NR neighbouring panels; token and column count within the task.
template <class X, int MR, int NR>
static void tile(const typename X::Value* x, int64_t x_row, const bf16* panel, const Stretch& part,
                 const Output& out, int64_t token, int64_t column) {
    vf sum[MR][NR] = {};
    float* partial = part.partial ? part.partial + token * part.row + column : nullptr;
    if (!part.first())
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NR; j++) sum[i][j] = load<vf>(partial + i * part.row + j * LANES);
    for (int64_t k = part.begin; k < part.end; k += 2) {
        vu b[NR];
        for (int j = 0; j < NR; j++) b[j] = load<vu>(panel + (j * part.inputs + k) * LANES);
#pragma GCC unroll 32
        for (int i = 0; i < MR; i++) X::step(sum[i], b, x + i * x_row + k);
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++)
            if (part.last())
                store_panel(sum[i][j], out, token + i, column + j * LANES);
            else
                store(partial + i * part.row + j * LANES, sum[i][j]);
}

template <class X>
using Tile = void (*)(const typename X::Value*, int64_t, const bf16*, const Stretch&, const Output&, int64_t,
                      int64_t);
template <class X, int NR, int... MR>
static Tile<X> pick(int rows, std::integer_sequence<int, MR...>) {
    static const Tile<X> table[] = {tile<X, MR + 1, NR>...};
    return table[rows - 1];
}

// Register blocks: MR x NR sums, NR weights, and room to widen. A load of x serves NR products and one of W
// serves MR.
#if defined(__AVX512F__)
constexpr int FEW_ROWS = 6, ROWS = 14, ROWS_WIDE = 12;
#else
constexpr int FEW_ROWS = 1, ROWS = 2, ROWS_WIDE = 2;
#endif
constexpr int64_t DEPTH = 2048;  // inputs of a stretch when there are many tokens

// What one task multiplies: rows of x by neighbouring panels.
template <class X>
struct Job {
    const typename X::Value* x;
    int64_t x_row, tokens;
    const bf16* packed;
    int64_t panels, inputs;
    Output out;
};

// All rows against panels from `panel` on, NR at a time as long as they last; returns the first one left. The
// rows are cut evenly: 8 + 8 is faster than 14 + 2.
template <class X, int MR, int NR>
static int64_t sweep(const Job<X>& job, const Stretch& part, int64_t panel) {
    const int64_t blocks = (job.tokens + MR - 1) / MR, step = (job.tokens + blocks - 1) / blocks;
    for (; panel + NR <= job.panels; panel += NR)
        for (int64_t i = 0; i < job.tokens; i += step) {
            auto run =
                pick<X, NR>((int)std::min(step, job.tokens - i), std::make_integer_sequence<int, MR>());
            run(job.x + i * job.x_row, job.x_row, job.packed + panel * LANES * job.inputs, part, job.out, i,
                panel * LANES);
        }
    return panel;
}

template <class X, int MR>
static void run(const Job<X>& job) {
    const int64_t depth = job.tokens > 2 * MR ? DEPTH : job.inputs, row = job.panels * LANES;
    const bool whole = depth >= job.inputs;
    float* partial = whole ? nullptr : scratch<1>().take<float>(job.tokens * row);
    for (int64_t begin = 0; begin < job.inputs; begin += depth) {
        const Stretch part = {begin, std::min(begin + depth, job.inputs), job.inputs, partial, row};
        int64_t panel = 0;
        if (X::FOUR_PANELS || job.tokens <= FEW_ROWS) panel = sweep<X, FEW_ROWS, 4>(job, part, panel);
        panel = sweep<X, MR, 2>(job, part, panel);
        sweep<X, MR, 1>(job, part, panel);
    }
}

// Rows of a task: its stretch of x and its partial sums stay in a core's second-level cache.
template <int MR>
static inline int64_t task_rows(int64_t tokens) {
    return tokens <= 2 * MR ? std::max<int64_t>(1, tokens) : 12 * MR;
}

template <class X, int MR>
static void product(const typename X::Value* x, int64_t x_row, const bf16* packed, int64_t inputs,
                    const Output& out, int64_t tokens, int threads) {
    const int64_t panels = panels_of(out.outputs), rows = task_rows<MR>(tokens);
    const int64_t row_blocks = (tokens + rows - 1) / rows;
    // Small enough pieces that a disturbed core holds nobody up.
    const int64_t wanted = panels * row_blocks / (16 * (int64_t)threads);
    const int64_t group = std::min<int64_t>(16, std::max<int64_t>(4, (wanted + 3) / 4 * 4));
    const int64_t groups = (panels + group - 1) / group;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < row_blocks * groups; task++) {
        const int64_t token = task % row_blocks * rows, first = task / row_blocks * group;
        const Output to = out.from(token, first * LANES);
        run<X, MR>({x + token * x_row, x_row, std::min(rows, tokens - token), packed + first * LANES * inputs,
                    std::min(group, panels - first), inputs, to});
    }
}

constexpr int64_t WIDENED = 2048;  // tokens widened at a time

static inline void widen_rows(const bf16* x, int64_t x_row, int64_t tokens, int64_t inputs, float* wide,
                              int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < inputs; k++) wide[t * inputs + k] = widen(x[t * x_row + k]);
}

static void linear(const bf16* x, int64_t x_row, const bf16* packed, int64_t inputs, const Output& out,
                   int64_t tokens, bool wide, int threads) {
    if (!wide) return product<Pairs, ROWS>(x, x_row, packed, inputs, out, tokens, threads);
    for (int64_t first = 0; first < tokens; first += WIDENED) {  // the copy must not grow with a long prompt
        const int64_t count = std::min(WIDENED, tokens - first);
        float* copy = scratch<0>().take<float>(count * inputs);
        widen_rows(x + first * x_row, x_row, count, inputs, copy, threads);
        product<Wide, ROWS_WIDE>(copy, inputs, packed, inputs, out.from(first, 0), count, threads);
    }
}

template <class X, int MR>
static void grouped_product(const typename X::Value* x, Grouped x_step, const bf16* packed, int64_t inputs,
                            bf16* out, Grouped out_step, int64_t outputs, int64_t tokens, int64_t heads,
                            int threads) {
    const int64_t rows = task_rows<MR>(tokens), blocks = (tokens + rows - 1) / rows;
    const int64_t size = packed_size(outputs, inputs);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < heads * blocks; task++) {
        const int64_t head = task / blocks, token = task % blocks * rows;
        const Output to = {out + head * out_step.head, out_step.token, nullptr, outputs};
        run<X, MR>({x + token * x_step.token + head * x_step.head, x_step.token,
                    std::min(rows, tokens - token), packed + head * size, panels_of(outputs), inputs,
                    to.from(token, 0)});
    }
}

// One weight per head: x [T, h, i], out [T, h, o].
static void batched_linear(const bf16* x, int64_t x_token, int64_t x_head, const bf16* packed, int64_t inputs,
                           bf16* out, int64_t out_token, int64_t out_head, int64_t outputs, int64_t tokens,
                           int64_t heads, bool wide, int threads) {
    if (!wide)
        return grouped_product<Pairs, ROWS>(x, {x_token, x_head}, packed, inputs, out, {out_token, out_head},
                                            outputs, tokens, heads, threads);
    float* copy = scratch<0>().take<float>(tokens * heads * inputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t k = 0; k < inputs; k++)
                copy[(t * heads + h) * inputs + k] = widen(x[t * x_token + h * x_head + k]);
    grouped_product<Wide, ROWS_WIDE>(copy, {heads * inputs, inputs}, packed, inputs, out,
                                     {out_token, out_head}, outputs, tokens, heads, threads);
}

}  // namespace mla
