// Pieces of work, handed out one by one to idle threads. A thread may take its next piece before it has
// finished the last, so that the beginning of the next can be prefetched meanwhile.
#pragma once
#include <atomic>
#include <cstdint>

#include "memory.h"

namespace mla {

constexpr int64_t PARALLEL_WORK = 1 << 16;  // elements from which waking the other threads pays

class WorkQueue {
 public:
    WorkQueue(int64_t count, int threads) : count_(count), threads_(threads) {}

    // The next piece, or -1 if there is none.
    int64_t take() {
        const int64_t piece = taken_++;
        return piece < count_ ? piece : -1;
    }
    // The next piece for a thread that still works on one, or -1: the last ones are left to idle threads.
    int64_t take_early() { return count_ - taken_ > threads_ ? take() : -1; }

 private:
    const int64_t count_, threads_;
    std::atomic<int64_t> taken_{0};
};

// Run all pieces on so many threads: run(piece, next), where `next` may be asked once, with the end of a
// piece, for the thread's next one, or -1. Throws std::bad_alloc.
template <class Run>
static void run_pieces(int64_t count, int threads, const Run& run) {
    WorkQueue queue(count, threads);
    Shortage shortage;
#pragma omp parallel num_threads(threads)
    shortage.within([&] {
        for (int64_t piece = queue.take(); piece >= 0;) {
            int64_t following = -1;
            run(piece, [&] { return following = queue.take_early(); });
            piece = following < 0 ? queue.take() : following;
        }
    });
    shortage.raise();
}

}  // namespace mla
