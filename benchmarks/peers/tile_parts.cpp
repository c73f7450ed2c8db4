// The parts of sparse attention by tiles, each alone: a block of 256 keys of 576 channels, of which 512 are values, and 128
// query rows. Compiled against the headers of the CPU plugin; tile_parts.py calls it.
#include <chrono>
#include <random>
#include <vector>

#include "attention_tiles.h"
#include "huge_pages.h"

using namespace mla;

constexpr int64_t CHANNELS = 576, VALUES = 512, PANELS = 8, ROWS = PANELS * LANES, BLOCKS = 64;

// What a thread works on. Copied keys, queries and sums are as large as in attention, and stay in the second-level cache.
struct Work {
    std::vector<const bf16*> rows;  // of BLOCKS blocks, at random
    bf16 *const keys = scratch<50>().take<bf16>(KEYS * CHANNELS), *const q = scratch<51>().take<bf16>(ROWS * CHANNELS),
               *const weights = scratch<52>().take<bf16>(ROWS * KEYS),
               *const zipped = scratch<53>().take<bf16>(KEYS * TILE_DEPTH);
    float *const scores = scratch<54>().take<float>(4 * KEYS * LANES),
                *const sums = scratch<55>().take<float>(ROWS * VALUES);

    Work(const bf16* cache, int64_t count, int seed) {
        std::mt19937_64 draw(seed);
        for (int64_t i = 0; i < BLOCKS * KEYS; i++) rows.push_back(cache + draw() % count * CHANNELS);
        for (int64_t i = 0; i < ROWS * CHANNELS; i++) q[i] = draw() & 0x3fff;  // up to 2: zeros would draw less power
        for (int64_t i = 0; i < ROWS * KEYS; i++) weights[i] = draw() & 0x3fff;
        std::fill_n(sums, ROWS * VALUES, 0.0f);
    }
    // Products from registers, as many as scores and values take.
    void products() {
        for (int64_t i = 0; i < PANELS * KEYS * (CHANNELS + VALUES) / (4 * LANES * TILE_DEPTH); i++)
            tile::dot<0, 4, 6>(), tile::dot<1, 4, 7>(), tile::dot<2, 5, 6>(), tile::dot<3, 5, 7>();
    }
    void copy(int64_t block) {
        for (int64_t i = 0; i < KEYS; i += LANES)
            for (int64_t k = 0; k < CHANNELS; k += TILE_DEPTH)
                for (int64_t j = i; j < i + LANES; j++)
                    store(keys + j * CHANNELS + k, load<vu>(rows[block % BLOCKS * KEYS + j] + k));
    }
    void score() {
        for (int64_t p = 0; p < PANELS; p += 2)
            for (int64_t i = 0; i < KEY_TILES; i += 2) {
                const bf16* const a[2] = {&keys[i * LANES * CHANNELS], &keys[(i + 1) * LANES * CHANNELS]};
                const bf16* const b[2] = {&q[p * LANES * CHANNELS], &q[(p + 1) * LANES * CHANNELS]};
                Block<2, 2>::zero();
                for (int64_t k = 0; k < CHANNELS / TILE_DEPTH; k++)
                    Block<2, 2>::multiply<true>(a, k * TILE_DEPTH, CHANNELS * sizeof(bf16), b, k * TILE_BF16);
                Block<2, 2>::store(&scores[p / 2 % 2 * 2 * KEYS * LANES + i * TILE_FLOATS], TILE_FLOATS, KEYS * LANES);
            }
    }
    void zip_keys(int64_t t, int64_t c) {
        for (int64_t i = 0; i < LANES; i++) {
            const bf16* const from = &keys[(t * TILE_DEPTH + 2 * i) * CHANNELS + c];
            const Zipped pair = zip(from, from + CHANNELS);
            store(&zipped[t * 2 * TILE_BF16 + i * TILE_DEPTH], pair.first);
            store(&zipped[(t * 2 + 1) * TILE_BF16 + i * TILE_DEPTH], pair.second);
        }
    }
    void weigh() {
        for (int64_t c = 0; c < VALUES; c += TILE_DEPTH)
            for (int64_t p = 0; p < PANELS; p += 2) {
                const bf16* const a[2] = {&weights[p * LANES * KEYS], &weights[(p + 1) * LANES * KEYS]};
                const bf16* const b[2] = {zipped, zipped + TILE_BF16};
                float* const sum = &sums[p * LANES * VALUES + c * LANES];
                Block<2, 2>::load(sum, LANES * VALUES, TILE_FLOATS);
                for (int64_t t = 0; t < STEPS; t++) {
                    if (!p && !t) zip_keys(0, c);
                    if (!p && t + 1 < STEPS) zip_keys(t + 1, c);
                    Block<2, 2>::multiply<true>(a, t * TILE_BF16, TILE_ROW, b, t * 2 * TILE_BF16);
                }
                Block<2, 2>::store(sum, LANES * VALUES, TILE_FLOATS);
            }
    }
};

// Seconds of `count` blocks by each thread: part 0 products, 1 copy, 2 score, 3 weigh, 4 the last three in turn.
extern "C" __attribute__((visibility("default"))) double run_part(int64_t part, bf16* cache, int64_t rows, int64_t count,
                                                                  int64_t threads) {
    double seconds = 0;
    make_huge_pages(cache, rows * CHANNELS * sizeof(bf16));
#pragma omp parallel num_threads(threads) reduction(max : seconds)
    {
        const TileSession session;
        Work work(cache, rows, (int)((uintptr_t)__builtin_frame_address(0) >> 12));
        for (int64_t block = 0; block < 4; block++) work.copy(block), work.score(), work.weigh();
#pragma omp barrier
        const auto begin = std::chrono::steady_clock::now();
        for (int64_t block = 0; block < count; block++) {
            if (part == 0) work.products();
            if (part == 1 || part == 4) work.copy(block);
            if (part == 2 || part == 4) work.score();
            if (part == 3 || part == 4) work.weigh();
        }
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
    return seconds;
}
