// Absorbed attention over latent pages. A task is some (query, head) rows of one request against a part
// of its keys; long requests are cut so that all threads have work, and the parts are merged by their running
// maxima.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

#include "attention_dispatch.h"
#include "work_queue.h"

namespace mla {

struct Latent {
    const bf16* q;  // [T, h, c + r] by strides
    int64_t q_token, q_head;
    const uint8_t* cache;  // [pages, page, layout.bytes], contiguous
    Layout layout;
    const int32_t* block_table;
    int64_t table_row;
    const int32_t *kv_lens, *cu_q;
    int64_t requests, page_size, heads, width, latent;
    float scale;
    bf16* out;  // [T, h, c] by strides
    int64_t out_token, out_head;
    float* lse;  // [T, h] by strides
    int64_t lse_token, lse_head;
    // Of sparse attention, where each query is a request, with the table of the one in `owner`: key j of query
    // t is at position selection[t, j].
    const int32_t* selection = nullptr;
    int64_t selection_row = 0;
    const int32_t* owner = nullptr;
    int64_t rows = 64;  // of a task, at most: more share the copies of selected keys
    int64_t page_bytes = page_size * layout.bytes;

    // Where a slot of a page lies: bf16 in a plain cache, else bytes.
    const bf16* at(int64_t page, int64_t slot) const {
        return (const bf16*)(cache + page * page_bytes + slot * layout.bytes);
    }
    // Where the token at a position of a request lies.
    const bf16* token(int64_t request, int64_t position) const {
        const uint32_t at_once = (uint32_t)position, page = (uint32_t)page_size;  // divides faster
        return at(block_table[request * table_row + at_once / page], at_once % page);
    }
};

struct LatentTask {
    int32_t request;
    int32_t first_row, rows;  // of the request's query_len * heads rows
    int32_t part, parts;      // of its keys
    int64_t keys;             // of one part
    int64_t saved;            // where the part is kept
};

// Keys of a part at least: splitting shorter ones costs more than it gives, unless threads would have no
// work.
constexpr int64_t LEAST_PART = 512, LEAST_ALONE = MLA_TILES ? 512 : 160;

static void plan_latent(const Latent& a, int threads, std::vector<LatentTask>& tasks, int64_t& saved) {
    tasks.clear();
    saved = 0;
    int64_t work = 0, whole = 0;
    for (int64_t b = 0; b < a.requests; b++) {
        const int64_t rows = (a.cu_q[b + 1] - a.cu_q[b]) * a.heads;
        work += rows * a.kv_lens[b];
        whole += (rows + a.rows - 1) / a.rows;
    }
    const int64_t least = whole < threads ? LEAST_ALONE : LEAST_PART;
    for (int64_t b = 0; b < a.requests; b++) {
        const int64_t rows = (a.cu_q[b + 1] - a.cu_q[b]) * a.heads, keys = a.kv_lens[b];
        for (int64_t row = 0; row < rows; row += a.rows) {
            const int64_t count = std::min(a.rows, rows - row);
            int64_t size = std::max(least, work / (4 * threads * count) + 1);
            int64_t parts = std::max<int64_t>(1, threads == 1 ? 1 : (keys + size - 1) / size);
            if (parts > threads) parts -= parts % threads;  // as much for each
            size = (keys + parts - 1) / parts;
            for (int64_t part = 0; part < parts; part++) {
                tasks.push_back(
                    {(int32_t)b, (int32_t)row, (int32_t)count, (int32_t)part, (int32_t)parts, size, saved});
                if (parts > 1) saved += (count + LANES - 1) / LANES * LANES * Attention::part_width(a.latent);
            }
        }
    }
    // The longest first: at the end, threads wait for the one that was taken last.
    std::sort(tasks.begin(), tasks.end(), [](const LatentTask& x, const LatentTask& y) {
        const int64_t longer = x.rows * x.keys - y.rows * y.keys;
        return longer ? longer > 0
                      : std::tie(x.request, x.first_row, x.part) < std::tie(y.request, y.first_row, y.part);
    });
}

static Row* latent_rows(const Latent& a, const LatentTask& task) {
    Row* rows = scratch<20>().take<Row>(a.rows);
    const int64_t start = a.cu_q[task.request], queries = a.cu_q[task.request + 1] - start;
    for (int64_t i = 0; i < task.rows; i++) {
        const int64_t query = (task.first_row + i) / a.heads, head = (task.first_row + i) % a.heads,
                      token = start + query;
        rows[i] = {a.q + token * a.q_token + head * a.q_head, a.out + token * a.out_token + head * a.out_head,
                   a.lse + token * a.lse_token + head * a.lse_head,
                   a.kv_lens[task.request] - queries + query + 1};
    }
    return rows;
}

// Where up to KEYS keys of a request from `first` on lie; those from `end` on repeat the last one before it.
static void find_keys(const Latent& a, int64_t request, int64_t first, int64_t end, const bf16** keys) {
    if (a.selection) {
        const int32_t* position = a.selection + request * a.selection_row;
        for (int64_t j = first; j < first + KEYS; j++)
            *keys++ = a.token(a.owner[request], position[std::min(j, end - 1)]);
        return;
    }
    const bf16** const last = keys + std::min(KEYS, end - first);
    for (int64_t position = first; keys < last;) {
        const uint8_t* key = (const uint8_t*)a.token(request, position);
        const int64_t run = std::min<int64_t>(last - keys, a.page_size - position % a.page_size);
        for (int64_t j = 0; j < run; j++) *keys++ = (const bf16*)(key + j * a.layout.bytes);
        position += run;
    }
    std::fill(keys, keys + std::max<int64_t>(0, first + KEYS - end), keys[-1]);
}

// The tasks of a call.
class LatentTasks {
 public:
    LatentTasks(const Latent& a, const std::vector<LatentTask>& tasks, int threads)
        : a_(a), all_(tasks.data()), queue_((int64_t)tasks.size(), threads) {}

    const LatentTask* take() { return task(queue_.take()); }
    const LatentTask* take_early() { return task(queue_.take_early()); }
    // Find the first keys of a task, or null where there are none.
    const bf16** begin(const LatentTask* task, const bf16** keys) const {
        if (!task) return nullptr;
        const int64_t first = task->part * task->keys, end = a_.kv_lens[task->request];
        if (first >= end) return nullptr;
        find_keys(a_, task->request, first, std::min(first + task->keys, end), keys);
        return keys;
    }

 private:
    const LatentTask* task(int64_t i) const { return i < 0 ? nullptr : all_ + i; }

    const Latent& a_;
    const LatentTask* const all_;
    WorkQueue queue_;
};

// Do a task; returns the same thread's next one, or null. That is taken with the last block, whose keys are
// attended while the first ones of the next task are fetched.
static const LatentTask* latent_task(const Latent& a, const LatentTask& task, float* saved,
                                     LatentTasks& left) {
    Attending attention(latent_rows(a, task), task.rows, a.width, a.latent, a.scale, a.width,
                        a.layout);
    const bf16* keys[2][KEYS];  // of this block and of the next one, alternating
    const int64_t begin = task.part * task.keys, end = std::min(begin + task.keys, attention.most());
    const LatentTask* following = nullptr;
    if (begin < end) find_keys(a, task.request, begin, end, keys[0]);
    bool turn = false;
    for (int64_t first = begin; first < end; first += KEYS, turn = !turn) {
        const bf16 **now = keys[turn], **next = keys[!turn];
        if (first + KEYS < end)
            find_keys(a, task.request, first + KEYS, end, next);
        else
            next = left.begin(following = left.take_early(), next);
        attention.attend(now, now, first, std::min(KEYS, end - first), next);
    }
    if (task.parts == 1)
        attention.finish();
    else
        attention.save(saved + task.saved);
    return following ? following : left.take();
}

static void merge_latent(const Latent& a, const LatentTask& first, float* saved) {
    Attending attention(latent_rows(a, first), first.rows, a.width, a.latent, a.scale, a.width,
                        a.layout);
    for (int64_t part = 0; part < first.parts; part++)
        attention.merge(saved + first.saved + part * attention.part_size());
    attention.finish();
}

static void latent_attention(const Latent& a, int threads) {
    static thread_local std::vector<LatentTask> tasks;
    int64_t size;
    plan_latent(a, threads, tasks, size);
    float* saved = scratch<21>().take<float>(size);
    const LatentTask* all = tasks.data();
    const int64_t count = (int64_t)tasks.size();
    LatentTasks left(a, tasks, threads);
    Shortage shortage;
#pragma omp parallel num_threads(threads)
    {
        const TileSession session;
        shortage.within([&] {
            for (const LatentTask* task = left.take(); task;) task = latent_task(a, *task, saved, left);
        });
        if (size) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < count; i++)
                if (all[i].parts > 1 && all[i].part == 0)
                    shortage.within([&] { merge_latent(a, all[i], saved); });
        }
    }
    shortage.raise();
}

}  // namespace mla
