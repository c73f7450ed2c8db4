// y = x W^T with W in panels, one vector of bf16 pairs at a time: AVX-512-BF16 multiplies such a vector as it
// is.
#pragma once
#include <utility>

#include "accumulators.h"
#include "jobs.h"
#include "memory.h"

namespace mla {
namespace pairs {

// Write sums of NR neighbouring panels.
template <int NR>
static inline void store_panels(const Sum16 (&sum)[NR], const Output<bf16>& out, int64_t token,
                                int64_t column) {
    if (out.bias || column + NR * LANES > out.outputs) {
        for (int j = 0; j < NR; j++) store_panel(whole(sum[j]), out, token, column + j * LANES);
        return;
    }
    bf16* to = out.data + token * out.row + column;
    for (int j = 0; j < NR; j++) store(to + j * LANES, narrow(whole(sum[j])));
}

// A stretch of the inputs. Sums of all but the last one are kept in `partial`, [tokens, outputs] of the task,
// so that the weights and tokens of a stretch fit the second-level cache.
struct Stretch {
    int64_t begin, end, inputs;
    float* partial;  // null: one stretch is all
    int64_t row;

    bool first() const { return begin == 0; }
    bool last() const { return end == inputs; }
};

// Two panels of the weights that come next, fetched to the second-level cache while others are multiplied:
// the processor predicts the next panels too late. With a single block of rows the weights are a plain
// stream, which it does predict.
struct Fetch {
    const bf16* panel[2];

    void line(int64_t k) const {
        for (int j = 0; j < 2; j++) __builtin_prefetch(panel[j] + k * LANES, 0, 2);
    }
};

// MR tokens times NR neighbouring panels; token and column count within the task.
template <int MR, int NR, bool FETCHES>
static void tile(const bf16* x, int64_t x_row, const bf16* panel, const Stretch& part,
                 const Output<bf16>& out, int64_t token, int64_t column, const Fetch& fetch) {
    Sum16 sum[MR][NR] = {};
    float* partial = part.partial ? part.partial + token * part.row + column : nullptr;
    if (!part.first())
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NR; j++) sum[i][j] = load_sum16(partial + i * part.row + j * LANES);
    for (int64_t k = part.begin; k < part.end; k += 2) {
        if (FETCHES) fetch.line(k - part.begin);
        Pair16 b[NR];
        for (int j = 0; j < NR; j++) b[j] = load_pair16(panel + (j * part.inputs + k) * LANES);
#pragma GCC unroll 32
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NR; j++) add_products(sum[i][j], b[j], load<uint32_t>(x + i * x_row + k));
    }
    for (int i = 0; i < MR; i++)
        if (part.last())
            store_panels(sum[i], out, token + i, column);
        else
            for (int j = 0; j < NR; j++) store(partial + i * part.row + j * LANES, sum[i][j]);
}

using Tile = void (*)(const bf16*, int64_t, const bf16*, const Stretch&, const Output<bf16>&, int64_t,
                      int64_t, const Fetch&);
template <int NR, bool FETCHES, int... MR>
static Tile pick(int rows, std::integer_sequence<int, MR...>) {
    static const Tile table[] = {tile<MR + 1, NR, FETCHES>...};
    return table[rows - 1];
}

// Register blocks: rows of x by panels. A load of x serves all panels, and one of W all rows: with six rows
// by four panels ten loads are enough for 24 products, which two panels need sixteen for.
constexpr int FEW_ROWS = 6, ROWS = 14;
constexpr int64_t DEPTH = 2048;  // inputs of a stretch, unless the tokens are few

using Work = Job<bf16, bf16>;

// All rows against panels from `panel` on, NR at a time while enough are left; returns the first one left.
// The rows are cut evenly: 8 + 8 is faster than 14 + 2. Where it FETCHES, the first blocks of rows prefetch
// the weights that come next, two panels each; `after` returns them when this job has none left in this
// stretch.
template <int MR, int NR, bool FETCHES, class After>
static int64_t sweep(const Work& job, const Stretch& part, int64_t panel, const After& after) {
    const int64_t blocks = (job.tokens + MR - 1) / MR, step = (job.tokens + blocks - 1) / blocks;
    for (; panel + NR <= job.panels; panel += NR) {
        const bf16 *here = job.weights(panel, part.begin), *next = nullptr;
        if (FETCHES) next = panel + NR < job.panels ? job.weights(panel + NR, part.begin) : after(part);
        for (int64_t i = 0, fetched = 0; i < job.tokens; i += step, fetched += 2) {
            const auto size = (int)std::min(step, job.tokens - i);
            const bf16* from = next && fetched < NR ? next + fetched * job.inputs * LANES : here;
            pick<NR, FETCHES>(size, std::make_integer_sequence<int, MR>())(
                job.x + i * job.x_row, job.x_row, job.weights(panel, 0), part, job.out, i, panel * LANES,
                {from, from + job.inputs * LANES});
        }
    }
    return panel;
}

// `next` is asked at most once, with the last weights of the job, for those of the thread's next one, or
// null.
template <class Next>
static void run(const Work& job, const Next& next) {
    const int64_t depth = job.tokens > FEW_ROWS ? DEPTH : job.inputs, row = job.panels * LANES;
    const bool whole = depth >= job.inputs;
    float* partial = whole ? nullptr : scratch<1>().take<float>(job.tokens * row);
    const auto after = [&](const Stretch& part) { return part.last() ? next() : job.weights(0, part.end); };
    for (int64_t begin = 0; begin < job.inputs; begin += depth) {
        const Stretch part = {begin, std::min(begin + depth, job.inputs), job.inputs, partial, row};
        int64_t panel = 0;
        if (job.tokens <= FEW_ROWS)
            panel = sweep<FEW_ROWS, 4, false>(job, part, panel, after);
        else
            panel = sweep<FEW_ROWS, 4, true>(job, part, panel, after);
        panel = sweep<ROWS, 2, false>(job, part, panel, after);
        sweep<ROWS, 1, false>(job, part, panel, after);
    }
}

// Rows of a task: its stretch of x and its partial sums stay in a core's second-level cache.
static inline int64_t task_rows(int64_t tokens) {
    return tokens <= 2 * ROWS ? std::max<int64_t>(1, tokens) : 12 * ROWS;
}

static void multiply(const Product<bf16, bf16>& p, int threads) {
    run_jobs(p, task_rows(p.tokens), threads, [](const Work& job, const auto& next) { run(job, next); });
}

}  // namespace pairs
}  // namespace mla
