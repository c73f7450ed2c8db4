// A product in jobs of some rows of x by neighbouring panels.
#pragma once
#include "panels.h"
#include "work_queue.h"

namespace mla {

template <class X, class T>
struct Job {
    const X* x;
    int64_t x_row, tokens;
    const T* packed;
    int64_t panels, inputs;
    Output<T> out;

    const T* weights(int64_t panel, int64_t k) const { return packed + (panel * inputs + k) * LANES; }
};

// Do all jobs of `rows` rows: run(job, next), where `next` may be asked once, with the last weights of the
// job, for those of the thread's next one, or null. Throws std::bad_alloc.
template <class X, class T, class Run>
static void run_jobs(const Product<X, T>& p, int64_t rows, int threads, const Run& run) {
    const int64_t panels = panels_of(p.out.outputs), row_blocks = (p.tokens + rows - 1) / rows;
    // Pieces are small enough that one disturbed core does not delay the others; one of several heads is.
    const int64_t wanted = panels * row_blocks / (16 * (int64_t)threads);
    const int64_t group =
        p.heads > 1 ? panels : std::min<int64_t>(16, std::max<int64_t>(4, (wanted + 3) / 4 * 4));
    const int64_t groups = (panels + group - 1) / group;
    const auto job_of = [&](int64_t task) -> Job<X, T> {
        const int64_t token = task % row_blocks * rows, piece = task / row_blocks;
        const int64_t head = piece / groups, first = piece % groups * group;
        Output<T> out = p.out;
        out.data += head * p.out_head;
        return {p.x + token * p.x_step.token + head * p.x_step.head,
                p.x_step.token,
                std::min(rows, p.tokens - token),
                p.packed + (head * panels + first) * LANES * p.inputs,
                std::min(group, panels - first),
                p.inputs,
                out.from(token, first * LANES)};
    };
    run_pieces(row_blocks * groups * p.heads, threads, [&](int64_t task, const auto& take) {
        run(job_of(task), [&]() -> const T* {
            const int64_t following = take();
            return following < 0 ? nullptr : job_of(following).packed;
        });
    });
}

}  // namespace mla
