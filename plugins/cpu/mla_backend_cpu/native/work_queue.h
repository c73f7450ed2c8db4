// Pieces of work, handed out one by one to idle threads. A thread may take its next piece before it has
// finished the last, so that the beginning of the next can be prefetched meanwhile.
#pragma once
#include <atomic>
#include <cstdint>

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

}  // namespace mla
