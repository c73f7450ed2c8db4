// Huge pages for memory that every step reads from end to end, or here and there: with small ones, looking up
// their addresses takes longer than some of the products. If the system has none, nothing changes.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mla {

constexpr uintptr_t HUGE_PAGE = 2 << 20;
constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, of Linux 6.1; its headers may be older than the system

static inline void advise(const void* data, size_t bytes, int advice) {
#if defined(__linux__)
    const uintptr_t begin = ((uintptr_t)data + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    const uintptr_t end = ((uintptr_t)data + bytes) & ~(HUGE_PAGE - 1);  // whole ones only
    if (end > begin) madvise((void*)begin, end - begin, advice);
#endif
}

// Before memory is written for the first time.
static inline void want_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    advise(data, bytes, MADV_HUGEPAGE);
#endif
}
// After it: some of it may have been in use before, on small pages.
static inline void make_huge_pages(void* data, size_t bytes) {
    advise(data, bytes, COLLAPSE);
}

}  // namespace mla
