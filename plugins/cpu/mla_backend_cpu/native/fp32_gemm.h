// y = x W^T in fp32, for processors without products of bf16, and for fp32 layers. W lies in panels: bf16
// ones (panels.h) are widened some inputs at a time, so that many rows of x use what was widened from the
// first-level cache; fp32 ones, panel[k][16], are used as they lie. x is copied first, widened, to rows whose
// distance is no power of two: rows of 8 KiB would all fall on the same cache sets.
#pragma once
#include "fp32_tile.h"
#include "jobs.h"
#include "memory.h"

namespace mla {
namespace fp32 {

constexpr int64_t CHUNK = 256;          // inputs of a panel that the first-level cache holds
constexpr int64_t X_FLOATS = 48 << 10;  // of a task's rows that the second-level cache holds
constexpr int64_t TASK_ROWS = 16 * TILE_ROWS;
constexpr int64_t STREAM_AHEAD = 2048;            // bytes
constexpr int STREAM_ROWS = WIDTH == 64 ? 3 : 1;  // that need nothing fetched ahead
constexpr int64_t COPIED = 2048;         // rows of x copied at a time: the copy must not grow with a prompt
constexpr int64_t COPIED_HEADS = 16384;  // the same of single heads, which are shorter
// Rows up to which weights are multiplied as they come from memory, and rows that widen them for all others.
constexpr int FEW_ROWS = WIDTH == 64 ? TILE_ROWS : WIDTH == 32 ? 5 : 3;
constexpr int WIDENING_ROWS = WIDTH == 64 ? 6 : FEW_ROWS;

static inline int64_t padded(int64_t inputs) {
    return inputs + LANES;
}

// x is widened.
template <class T>
using Work = Job<float, T>;

// W's bytes for one more k.
template <class T>
constexpr int64_t STEP = LANES * sizeof(T);

template <int MR, int NP, bool FETCHES>
static void add_panels(const float* x, int64_t x_row, const bf16* b, int64_t strip, const Sums& sums,
                       int64_t depth, Ahead ahead) {
    add_pairs_tile<MR, NP, FETCHES, false>(RowMajor{x, x_row}, b, strip, sums, depth, ahead, nullptr, 0);
}
template <int MR, int NP, bool FETCHES>
static void add_panels(const float* x, int64_t x_row, const float* b, int64_t strip, const Sums& sums,
                       int64_t depth, Ahead ahead) {
    add_tile<MR, NP, FETCHES>(RowMajor{x, x_row}, {b, LANES, strip}, sums, depth, ahead);
}

template <class T>
using AddPanels = void (*)(const float*, int64_t, const T*, int64_t, const Sums&, int64_t, Ahead);
template <class T, int NP, bool FETCHES, int... MR>
static AddPanels<T> pick(int64_t rows, std::integer_sequence<int, MR...>) {
    static const AddPanels<T> table[] = {add_panels<MR + 1, NP, FETCHES>...};
    return table[rows - 1];
}
// What multiplies `rows` of up to MOST rows.
template <class T, int NP, bool FETCHES, int MOST>
static AddPanels<T> pick(int64_t rows) {
    return pick<T, NP, FETCHES>(rows, std::make_integer_sequence<int, MOST>());
}

template <class T>
static void write(const Work<T>& job, const Sums& sums, int64_t token, int64_t rows, int64_t panel,
                  int64_t count) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t n = 0; n < count; n++)
            store_panel(load<vf>(sums.base + i * sums.row + n * LANES), job.out, token + i,
                        (panel + n) * LANES);
}

// Up to MOST rows by panels from `panel` on, NP at a time; returns the first one left. The weights are a
// plain stream, but the processor runs too little ahead of it, except for a single row.
template <class T, int NP, int MOST>
static int64_t stream(const Work<T>& job, int64_t panel) {
    float sum[MOST * NP * LANES];
    const auto add = pick<T, NP, (MOST > STREAM_ROWS), MOST>(job.tokens);
    for (; panel + NP <= job.panels; panel += NP) {
        const T* weights = job.weights(panel, 0);
        const Sums sums = {sum, NP * LANES, true};
        const Ahead ahead = {(const char*)weights + STREAM_AHEAD, STEP<T>, job.inputs * STEP<T>};
        add(job.x, job.x_row, weights, job.inputs * LANES, sums, job.inputs, ahead);
        write(job, sums, 0, job.tokens, panel, NP);
    }
    return panel;
}

// Up to FEW_ROWS: a tile of fewer rows takes more panels, so that it has sums enough to be busy with.
template <class T>
static void few_rows(const Work<T>& job) {
    int64_t panel = 0;
    if (job.tokens == 1) panel = stream<T, 4 * TILE_STRIPS, 1>(job, panel);
    if (job.tokens <= 3) panel = stream<T, 2 * TILE_STRIPS, 3>(job, panel);
    panel = stream<T, TILE_STRIPS, FEW_ROWS>(job, panel);
    stream<T, 1, FEW_ROWS>(job, panel);
}

// The inputs that stay in the second-level cache for all rows of a job, and its sums, [tokens, outputs].
struct Stretch {
    int64_t begin, end;
    float* sum;
    int64_t row;
};

// Some inputs of neighbouring panels, which all rows are multiplied by before the next ones.
template <class T>
struct Chunk {
    int64_t panel, k, depth;
    const T* next;  // what follows, or null; the processor does not predict it

    Sums sums(const Stretch& part, int64_t token) const {
        return {part.sum + token * part.row + panel * LANES, part.row, k == 0};
    }
    // What a block of rows fetches of the next chunk: the first one does it all, or the first two where one
    // would ask for more than a line with every k.
    Ahead share(int64_t block, int64_t blocks, int64_t strip) const {
        const int64_t fetching = std::min<int64_t>(sizeof(T) / sizeof(bf16), blocks);
        if (!next || block >= fetching) return {nullptr, 0, 0};
        return {(const char*)next + block * CHUNK * STEP<T> / fetching, STEP<T> / fetching, strip};
    }
};

// Rows from `first` on by NP strips. The last chunk's sums are results.
template <class T, int NP>
static void multiply_rows(const Work<T>& job, const Stretch& part, const Chunk<T>& chunk,
                          const Strips& strips, int64_t first) {
    const int64_t blocks = (job.tokens - first + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t block = 0, i = first, rows; block < blocks; block++, i += rows) {
        rows = (job.tokens - i + blocks - block - 1) / (blocks - block);
        const Ahead ahead = chunk.share(block, blocks, job.inputs * STEP<T>);
        const auto add =
            ahead.at ? pick<float, NP, true, TILE_ROWS>(rows) : pick<float, NP, false, TILE_ROWS>(rows);
        add(job.x + i * job.x_row + chunk.k, job.x_row, strips.base, strips.strip, chunk.sums(part, i),
            chunk.depth, ahead);
    }
    if (chunk.k + chunk.depth == job.inputs) write(job, chunk.sums(part, 0), 0, job.tokens, chunk.panel, NP);
}

// All rows by a chunk of NP panels.
template <int NP>
static void multiply(const Work<float>& job, const Stretch& part, const Chunk<float>& chunk) {
    const Strips strips = {job.weights(chunk.panel, chunk.k), LANES, job.inputs * LANES};
    multiply_rows<float, NP>(job, part, chunk, strips, 0);
}
// The first rows widen the weights for all others.
template <int NP>
static void multiply(const Work<bf16>& job, const Stretch& part, const Chunk<bf16>& chunk) {
    const Strips strips = {scratch<2>().take<float>(NP * CHUNK * LANES), LANES, CHUNK * LANES};
    const RowMajor x = {job.x + chunk.k, job.x_row};
    add_pairs_tile<WIDENING_ROWS, NP, false, true>(x, job.weights(chunk.panel, chunk.k), job.inputs * LANES,
                                                   chunk.sums(part, 0), chunk.depth, {},
                                                   const_cast<float*>(strips.base), strips.strip);
    multiply_rows<bf16, NP>(job, part, chunk, strips, WIDENING_ROWS);
}

// Panels from `panel` on, NP at a time; returns the first one left. `after` is asked for the weights that
// come after the last ones of a stretch, or null.
template <class T, int NP, class After>
static int64_t sweep(const Work<T>& job, const Stretch& part, int64_t panel, const After& after) {
    for (; panel + NP <= job.panels; panel += NP)
        for (int64_t k = part.begin; k < part.end; k += CHUNK) {
            const T* next = k + CHUNK < part.end      ? job.weights(panel, k + CHUNK)
                            : panel + NP < job.panels ? job.weights(panel + NP, part.begin)
                                                      : after();
            multiply<NP>(job, part, {panel, k, std::min(CHUNK, part.end - k), next});
        }
    return panel;
}

// `next` is asked at most once, with the last weights of the job, for those of the thread's next one, or
// null.
template <class T, class Next>
static void run(const Work<T>& job, const Next& next) {
    if (job.tokens <= FEW_ROWS) return few_rows(job);
    const int64_t row = job.panels * LANES;
    float* sum = scratch<1>().take<float>(job.tokens * row);
    const int64_t depth = std::max(CHUNK, X_FLOATS / job.tokens / CHUNK * CHUNK);
    for (int64_t begin = 0; begin < job.inputs; begin += depth) {
        const Stretch part = {begin, std::min(begin + depth, job.inputs), sum, row};
        const auto after = [&] { return part.end < job.inputs ? job.weights(0, part.end) : next(); };
        const int64_t panel = sweep<T, TILE_STRIPS>(job, part, 0, after);
        sweep<T, 1>(job, part, panel, after);
    }
}

static inline void widen_row(const bf16* x, int64_t count, float* to) {
    for (int64_t k = 0; k < count; k++) to[k] = widen(x[k]);
}
static inline void widen_row(const float* x, int64_t count, float* to) {
    std::memcpy(to, x, count * sizeof(float));
}

// Rows of a task: even parts, so that none is left with a few.
static inline int64_t task_rows(int64_t tokens) {
    const int64_t parts = (tokens + TASK_ROWS - 1) / TASK_ROWS, rows = (tokens + parts - 1) / parts;
    return parts == 1 ? rows : (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

template <class T>
static void multiply(const Product<T, T>& p, int threads) {
    const int64_t row = padded(p.inputs);
    const int64_t most = p.heads > 1 ? std::max(TASK_ROWS, COPIED_HEADS / p.heads) : COPIED;
    float* copy = scratch<0>().take<float>(std::min(most, p.tokens) * p.heads * row);  // [h, T, padded]
    for (int64_t first = 0; first < p.tokens; first += most) {
        const Product<T, T> some = p.part(first, most);
        const int64_t count = some.tokens, rows = count * p.heads;
#pragma omp parallel for num_threads(threads) if (rows * p.inputs > PARALLEL_WORK)
        for (int64_t i = 0; i < rows; i++)
            widen_row(some.x + i % count * p.x_step.token + i / count * p.x_step.head, p.inputs,
                      copy + i * row);
        const Product<float, T> widened = {copy,     {row, count * row}, p.packed, p.inputs,
                                           some.out, p.out_head,         count,    p.heads};
        run_jobs(widened, task_rows(count), threads,
                 [](const Work<T>& job, const auto& next) { run(job, next); });
    }
}

}  // namespace fp32
}  // namespace mla
