// Scratch memory: grows to the largest use, is kept, and is never shared between threads.
#pragma once
#include <cstdlib>

namespace mla {

struct Buffer {
    void* data = nullptr;
    size_t size = 0;

    ~Buffer() { std::free(data); }

    template <class T>
    T* take(size_t count) {
        size_t bytes = (count * sizeof(T) + 4095) & ~(size_t)4095;
        if (bytes > size) {
            std::free(data);
            data = std::aligned_alloc(4096, bytes);
            if (!data) std::abort();
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

}  // namespace mla
