// Scratch memory: grows to the largest use, is kept, and is never shared between threads.
#pragma once
#include <atomic>
#include <cstdlib>
#include <new>

namespace mla {

struct Buffer {
    void* data = nullptr;
    size_t size = 0;

    ~Buffer() { std::free(data); }

    // Throws std::bad_alloc.
    template <class T>
    T* take(size_t count) {
        size_t bytes = (count * sizeof(T) / 4096 + 1) * 4096;
        if (bytes > size) {
            std::free(data);
            size = 0;
            data = std::aligned_alloc(4096, bytes);
            if (!data) throw std::bad_alloc();
            size = bytes;
        }
        return (T*)data;
    }
};

// One buffer per thread and name.
template <int Name>
static Buffer& scratch() {
    static thread_local Buffer buffer;
    return buffer;
}

// Brings a lack of memory out of a parallel region, whose threads no exception may leave.
class Shortage {
 public:
    // Do some work, unless memory has run out.
    template <class Work>
    void within(const Work& work) {
        if (met_) return;
        try {
            work();
        } catch (const std::bad_alloc&) {
            met_ = true;
        }
    }
    // Throws std::bad_alloc if memory has run out; after the region.
    void raise() const {
        if (met_) throw std::bad_alloc();
    }

 private:
    std::atomic<bool> met_{false};
};

// Do some work. Returns a sentence if memory runs out, else null.
template <class Work>
static const char* attempt(const Work& work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return "out of memory: there is none left for what the kernel keeps while it computes.";
    }
    return nullptr;
}

}  // namespace mla
