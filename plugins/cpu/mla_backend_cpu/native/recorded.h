// Calls whose arguments were recorded once, replayed one after another. A caller that repeats itself then
// pays for one call from outside instead of many.
#pragma once
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace mla {

// One argument in 64 bits: an address or an int64_t as it is, a float or an int in the low bytes.
typedef int64_t Slot;
// Makes a call of `slots`, but with `threads` threads; returns the fault in its arguments, or null.
typedef const char* (*Recorded)(const Slot* slots, int threads);

template <class T>
static inline T argument(Slot slot) {
    T value;
    std::memcpy(&value, &slot, sizeof(T));
    return value;
}

// FUNCTION takes the number of threads last.
template <auto FUNCTION>
struct Recording;
template <class R, class... A, R (*FUNCTION)(A...)>
struct Recording<FUNCTION> {
    typedef std::tuple<A...> Types;

    template <size_t... I>
    static const char* call(const Slot* slots, int threads, std::index_sequence<I...>) {
        if constexpr (std::is_void_v<R>) {
            FUNCTION(argument<std::tuple_element_t<I, Types>>(slots[I])..., threads);
            return nullptr;
        } else {
            return FUNCTION(argument<std::tuple_element_t<I, Types>>(slots[I])..., threads);
        }
    }
    static const char* run(const Slot* slots, int threads) {
        return call(slots, threads, std::make_index_sequence<sizeof...(A) - 1>());
    }
};

// `records` holds, for each of `count` calls, the function, the number of its slots, and the slots.
static inline const char* run_recorded(const Slot* records, int64_t count, int threads) {
    for (; count > 0; count--, records += 2 + records[1])
        if (const char* wrong = argument<Recorded>(records[0])(records + 2, threads)) return wrong;
    return nullptr;
}

}  // namespace mla
