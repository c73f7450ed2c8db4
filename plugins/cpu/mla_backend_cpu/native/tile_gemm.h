// y = x W^T with W in panels, by AMX tiles: sixteen rows of a panel are a tile of B as they lie in memory.
//
// x is copied into tiles of A first, once for all threads. With few tokens a task is some panels and runs
// through all inputs, streaming the weights. With many it is a block of rows by a block of panels, and inputs
// come in stretches: the weights of a stretch then stay in the first-level cache while the rows pass by, and
// rows and sums in the second-level one.
#pragma once
#include "memory.h"
#include "panels.h"
#include "tiles.h"

namespace mla {
namespace tiled {

constexpr int64_t STRETCH = 8;         // tiles of inputs; twice as many were slower
constexpr int64_t FEW_TILES = 2;       // rows of tiles up to which one pass reads all weights
constexpr int64_t MOST_TILES = 32;     // rows of tiles in a task
constexpr int64_t MOST_PANELS = 16;    // of a task
constexpr int64_t MOST_TOKENS = 2048;  // copied at a time: the copy must not grow with a long prompt

struct Tiled : Product<bf16, bf16> {
    const bf16* a;  // x in tiles, [heads, row tiles, depth][16][32]

    int64_t row_tiles() const { return (tokens + LANES - 1) / LANES; }
    int64_t depth() const { return (inputs + TILE_DEPTH - 1) / TILE_DEPTH; }
    int64_t panels() const { return panels_of(out.outputs); }
    const bf16* a_tile(int64_t head, int64_t row) const {
        return a + (head * row_tiles() + row) * depth() * TILE_BF16;
    }
    const bf16* panel(int64_t head, int64_t panel) const {
        return packed + (head * panels() + panel) * LANES * inputs;
    }
};

// Copy tiles `from` .. `to` - 1 of one row of tiles of x, filled up with zeros.
static void copy_tiles(const Tiled& p, int64_t head, int64_t row, int64_t from, int64_t to, bf16* a) {
    const int64_t begin = from * TILE_DEPTH, end = std::min(to * TILE_DEPTH, p.inputs);
    for (int64_t i = 0; i < LANES; i++) {
        const int64_t token = row * LANES + i;
        const bf16* x = p.x + token * p.x_step.token + head * p.x_step.head;
        bf16* tile = a + ((head * p.row_tiles() + row) * p.depth() + from) * TILE_BF16 + i * TILE_DEPTH;
        for (int64_t k = begin; k < end; k += TILE_DEPTH, tile += TILE_BF16) {
            const int64_t count = token < p.tokens ? std::min(TILE_DEPTH, p.inputs - k) : 0;
            if (count < TILE_DEPTH) std::memset(tile, 0, TILE_ROW);
            if (count) std::memcpy(tile, x + k, count * sizeof(bf16));
        }
    }
}

// A part of the product, in tiles; `partial` holds its sums between stretches, [panels, rows][16][16].
struct TileTask {
    int64_t head, row, rows, panel, panels;
    float* partial;
};

// Write the sums of M x N tiles, of which the last rows and columns may not exist.
template <int M, int N>
static void write_block(const Tiled& p, int64_t head, int64_t row, int64_t panel) {
    alignas(64) float sums[M * N * TILE_FLOATS];
    Block<M, N>::store(sums, N * TILE_FLOATS, TILE_FLOATS);
    Output<bf16> out = p.out;
    out.data += head * p.out_head;
    for (int m = 0; m < M; m++) {
        const int64_t token = (row + m) * LANES, count = std::min<int64_t>(LANES, p.tokens - token);
        for (int64_t i = 0; i < count; i++)
            for (int n = 0; n < N; n++)
                store_panel(load<vf>(sums + (m * N + n) * TILE_FLOATS + i * LANES), out, token + i,
                            (panel + n) * LANES);
    }
}

// Multiply by the rows of the panels that do not fill a tile.
template <int M, int N>
static void multiply_rest(const Tiled& p, const bf16* const* a, const bf16* const* b, int64_t whole) {
    alignas(64) bf16 rest[N][TILE_BF16] = {};
    const bf16* tiles[N];
    for (int n = 0; n < N; n++) {
        const int64_t begin = whole * TILE_BF16;
        std::memcpy(rest[n], b[n] + begin, (p.inputs * LANES - begin) * sizeof(bf16));
        tiles[n] = rest[n];
    }
    Block<M, N>::multiply(a, whole * TILE_BF16, TILE_ROW, tiles, 0);
}

// M x N tiles of a task over the inputs' tiles begin .. end - 1; row and panel count within the task.
template <int M, int N>
static void multiply_block(const Tiled& p, const TileTask& task, int64_t row, int64_t panel, int64_t begin,
                           int64_t end) {
    typedef Block<M, N> Sums;
    const bf16 *a[M], *b[N];
    for (int m = 0; m < M; m++) a[m] = p.a_tile(task.head, task.row + row + m);
    for (int n = 0; n < N; n++) b[n] = p.panel(task.head, task.panel + panel + n);
    float* partial = task.partial ? task.partial + (panel * task.rows + row) * TILE_FLOATS : nullptr;
    if (begin)
        Sums::load(partial, TILE_FLOATS, task.rows * TILE_FLOATS);
    else
        Sums::zero();
    const int64_t whole = std::min(end, p.inputs / TILE_DEPTH);
    for (int64_t k = begin; k < whole; k++) Sums::multiply(a, k * TILE_BF16, TILE_ROW, b, k * TILE_BF16);
    if (whole < end) multiply_rest<M, N>(p, a, b, whole);
    if (end < p.depth())
        Sums::store(partial, TILE_FLOATS, task.rows * TILE_FLOATS);
    else
        write_block<M, N>(p, task.head, task.row + row, task.panel + panel);
}

// Blocks of M x N while enough panels are left; returns the first panel left.
template <int M, int N>
static int64_t sweep(const Tiled& p, const TileTask& task, int64_t panel, int64_t begin, int64_t end) {
    for (; panel + N <= task.panels; panel += N) {
        int64_t row = 0;
        for (; row + M <= task.rows; row += M) multiply_block<M, N>(p, task, row, panel, begin, end);
        for (; row < task.rows; row++) multiply_block<1, N>(p, task, row, panel, begin, end);
    }
    return panel;
}

static void run_task(const Tiled& p, const TileTask& task, int64_t stretch) {
    for (int64_t begin = 0; begin < p.depth(); begin += stretch) {
        const int64_t end = std::min(begin + stretch, p.depth());
        int64_t panel = task.rows == 1 ? sweep<1, 4>(p, task, 0, begin, end) : 0;
        panel = sweep<2, 2>(p, task, panel, begin, end);
        sweep<2, 1>(p, task, panel, begin, end);
    }
}

// How a product is cut: blocks of rows and of panels, small enough that every thread has some.
struct Cut {
    int64_t rows, panels;

    Cut(const Tiled& p, int threads) : rows(MOST_TILES), panels(MOST_PANELS) {
        const int64_t wanted = (p.row_tiles() > FEW_TILES ? 4 : 16) * (int64_t)threads;
        while (tasks(p) < wanted && rows > 4) rows /= 2;
        while (tasks(p) < wanted && panels > 4) panels /= 2;
        const int64_t blocks = row_blocks(p);
        if (blocks) rows = (p.row_tiles() + blocks - 1) / blocks;  // evenly
    }
    int64_t row_blocks(const Tiled& p) const { return (p.row_tiles() + rows - 1) / rows; }
    int64_t panel_blocks(const Tiled& p) const { return (p.panels() + panels - 1) / panels; }
    int64_t tasks(const Tiled& p) const { return p.heads * row_blocks(p) * panel_blocks(p); }
};

static void multiply_part(Tiled p, int threads) {
    const Cut cut(p, threads);
    const int64_t row_blocks = cut.row_blocks(p), panel_blocks = cut.panel_blocks(p), depth = p.depth();
    const int64_t rows = p.row_tiles(), pieces = (depth + STRETCH - 1) / STRETCH;
    const int64_t stretch = rows > FEW_TILES ? STRETCH : depth;
    bf16* a = scratch<0>().take<bf16>(p.heads * rows * depth * TILE_BF16);
    p.a = a;
    Shortage shortage;
#pragma omp parallel num_threads(threads)
    {
        const TileSession session;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.heads * rows * pieces; i++) {
            const int64_t from = i % pieces * STRETCH;
            copy_tiles(p, i / pieces / rows, i / pieces % rows, from, std::min(from + STRETCH, depth), a);
        }
        float* partial = nullptr;
        shortage.within([&] {
            if (stretch < depth) partial = scratch<1>().take<float>(cut.rows * cut.panels * TILE_FLOATS);
        });
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < cut.tasks(p); i++) {  // neighbouring tasks share their weights
            const int64_t row = i % row_blocks * cut.rows, panel = i / row_blocks % panel_blocks * cut.panels;
            const TileTask task = {i / row_blocks / panel_blocks,       row,
                                   std::min(cut.rows, rows - row),      panel,
                                   std::min(cut.panels, p.panels() - panel), partial};
            shortage.within([&] { run_task(p, task, stretch); });
        }
    }
    shortage.raise();
}

static void multiply(const Product<bf16, bf16>& p, int threads) {
    for (int64_t first = 0; first < p.tokens; first += MOST_TOKENS)
        multiply_part({p.part(first, MOST_TOKENS), nullptr}, threads);
}

}  // namespace tiled
}  // namespace mla
