// Pieces of work, handed out one by one to whichever thread is free. A thread may take its next piece before
// it is done with the last, so that what that piece begins with can be fetched meanwhile.
#pragma once
#include <atomic>
#include <cstdint>

namespace mla {

class WorkQueue {
 public:
    WorkQueue(int64_t count, int threads) : count_(count), threads_(threads) {}

    // The next piece, or -1 when there is none.
    int64_t take() {
        const int64_t piece = taken_++;
        return piece < count_ ? piece : -1;
    }
    // The next piece for a thread that still works on one, or -1: the last ones are left to whoever is free.
    int64_t take_early() { return count_ - taken_ > threads_ ? take() : -1; }

 private:
    const int64_t count_, threads_;
    std::atomic<int64_t> taken_{0};
};

}  // namespace mla
