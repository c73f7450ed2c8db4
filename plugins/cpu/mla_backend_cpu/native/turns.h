// Pieces of work, handed out one by one to whichever thread is free. A thread may take its next piece before
// it is done with the last, so that what that piece begins with can be fetched meanwhile.
#pragma once
#include <atomic>
#include <cstdint>

namespace mla {

class Turns {
 public:
    explicit Turns(int64_t count) : count_(count) {}

    // The next piece, or -1 when there is none.
    int64_t take() {
        const int64_t piece = taken_++;
        return piece < count_ ? piece : -1;
    }

 private:
    const int64_t count_;
    std::atomic<int64_t> taken_{0};
};

}  // namespace mla
