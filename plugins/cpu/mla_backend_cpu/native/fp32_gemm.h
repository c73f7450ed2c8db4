// y = x W^T in fp32, for processors without products of bf16, and for fp32 layers. W lies in panels: bf16
// ones (panels.h) are widened some inputs at a time, so that many rows of x use what was widened from the
// first-level cache; fp32 ones, panel[k][16], are used as they lie. x is copied first, widened, to rows whose
// distance is no power of two: rows of 8 KiB would all fall on the same cache sets.
#pragma once
#include "fp32_tile.h"
#include "memory.h"
#include "panels.h"
#include "work_queue.h"

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

// Rows of x by neighbouring panels.
template <class T>
struct Job {
    const float* x;
    int64_t x_row, tokens;
    const T* packed;
    int64_t panels, inputs;
    Output<T> out;

    const T* weights(int64_t panel, int64_t k) const { return packed + (panel * inputs + k) * LANES; }
};

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
static void write(const Job<T>& job, const Sums& sums, int64_t token, int64_t rows, int64_t panel,
                  int64_t count) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t n = 0; n < count; n++)
            store_panel(load<vf>(sums.base + i * sums.row + n * LANES), job.out, token + i,
                        (panel + n) * LANES);
}

// Up to MOST rows by panels from `panel` on, NP at a time; returns the first one left. The weights are a
// plain stream, but the processor runs too little ahead of it, except for a single row.
template <class T, int NP, int MOST>
static int64_t stream(const Job<T>& job, int64_t panel) {
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
static void few_rows(const Job<T>& job) {
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
static void multiply_rows(const Job<T>& job, const Stretch& part, const Chunk<T>& chunk, const Strips& strips,
                          int64_t first) {
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
static void multiply(const Job<float>& job, const Stretch& part, const Chunk<float>& chunk) {
    const Strips strips = {job.weights(chunk.panel, chunk.k), LANES, job.inputs * LANES};
    multiply_rows<float, NP>(job, part, chunk, strips, 0);
}
// The first rows widen the weights for all others.
template <int NP>
static void multiply(const Job<bf16>& job, const Stretch& part, const Chunk<bf16>& chunk) {
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
static int64_t sweep(const Job<T>& job, const Stretch& part, int64_t panel, const After& after) {
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
static void run(const Job<T>& job, const Next& next) {
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

template <class T, class JobOf>
static void run_all(int64_t count, const JobOf& job_of, int threads) {
    run_pieces(count, threads, [&](int64_t task, const auto& take) {
        run<T>(job_of(task), [&]() -> const T* {
            const int64_t following = take();
            return following < 0 ? nullptr : job_of(following).packed;
        });
    });
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
static void product(const float* x, int64_t x_row, const T* packed, int64_t inputs, const Output<T>& out,
                    int64_t tokens, int threads) {
    const int64_t panels = panels_of(out.outputs), rows = task_rows(tokens);
    const int64_t row_blocks = (tokens + rows - 1) / rows;
    // Pieces are small enough that one disturbed core does not delay the others.
    const int64_t wanted = panels * row_blocks / (16 * (int64_t)threads);
    const int64_t group = std::min<int64_t>(16, std::max<int64_t>(4, (wanted + 3) / 4 * 4));
    const int64_t groups = (panels + group - 1) / group;
    const auto job_of = [&](int64_t task) -> Job<T> {
        const int64_t token = task % row_blocks * rows, first = task / row_blocks * group;
        return {x + token * x_row,
                x_row,
                std::min(rows, tokens - token),
                packed + first * LANES * inputs,
                std::min(group, panels - first),
                inputs,
                out.from(token, first * LANES)};
    };
    run_all<T>(row_blocks * groups, job_of, threads);
}

template <class T>
static void linear(const T* x, int64_t x_row, const T* packed, int64_t inputs, const Output<T>& out,
                   int64_t tokens, int threads) {
    const int64_t row = padded(inputs);
    float* copy = scratch<0>().take<float>(std::min(COPIED, tokens) * row);
    for (int64_t first = 0; first < tokens; first += COPIED) {
        const int64_t count = std::min(COPIED, tokens - first);
        const T* from = x + first * x_row;
#pragma omp parallel for num_threads(threads) if (count * inputs > PARALLEL_WORK)
        for (int64_t t = 0; t < count; t++) widen_row(from + t * x_row, inputs, copy + t * row);
        product(copy, row, packed, inputs, out.from(first, 0), count, threads);
    }
}

// One weight per head: x [T, h, i], out [T, h, o], of tokens whose copies are [h, T, padded].
template <class T>
static void grouped_product(const float* copy, const T* packed, int64_t inputs, T* out, Grouped out_step,
                            int64_t outputs, int64_t tokens, int64_t heads, int threads) {
    const int64_t row = padded(inputs), rows = task_rows(tokens), blocks = (tokens + rows - 1) / rows;
    const int64_t size = packed_size(outputs, inputs);
    const auto job_of = [&](int64_t task) -> Job<T> {
        const int64_t head = task / blocks, token = task % blocks * rows;
        return {copy + (head * tokens + token) * row,
                row,
                std::min(rows, tokens - token),
                packed + head * size,
                panels_of(outputs),
                inputs,
                Output<T>{out + head * out_step.head, out_step.token, nullptr, outputs}.from(token, 0)};
    };
    run_all<T>(heads * blocks, job_of, threads);
}

template <class T>
static void batched_linear(const T* x, Grouped x_step, const T* packed, int64_t inputs, T* out,
                           Grouped out_step, int64_t outputs, int64_t tokens, int64_t heads, int threads) {
    const int64_t row = padded(inputs), most = std::max(TASK_ROWS, COPIED_HEADS / heads);
    float* copy = scratch<0>().take<float>(std::min(most, tokens) * heads * row);
    for (int64_t first = 0; first < tokens; first += most) {
        const int64_t count = std::min(most, tokens - first);
        const T* from = x + first * x_step.token;
#pragma omp parallel for num_threads(threads) if (count * heads * inputs > PARALLEL_WORK)
        for (int64_t i = 0; i < count * heads; i++)
            widen_row(from + i % count * x_step.token + i / count * x_step.head, inputs, copy + i * row);
        grouped_product(copy, packed, inputs, out + first * out_step.token, out_step, outputs, count, heads,
                        threads);
    }
}

}  // namespace fp32
}  // namespace mla
