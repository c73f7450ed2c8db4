// Runs the kernels on awkward sizes, to be compiled with sanitizers (test_native_build.py does). Buffers are exactly
// as large as they must be and bf16 ones start at an odd address; slots of the cache that no request owns are
// poisoned and unused table entries name no page. One element too far ends the program; a wrong value, too.
#include <cstdio>
#include "api.cpp"
#if MLA_TILES && !defined(MLA_EMULATE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

static int failures = 0, cases = 0;

// `count` elements and not a byte more; those of bf16 begin two bytes behind an aligned address.
template <class T>
struct Exact {
    static constexpr size_t SHIFT = sizeof(T) == sizeof(bf16);
    T* base;
    T* data;
    size_t count;

    explicit Exact(size_t count) : base((T*)std::malloc((count + SHIFT) * sizeof(T))), data(base + SHIFT), count(count) {
        std::memset((void*)base, 0xff, (count + SHIFT) * sizeof(T));  // NaN, or nowhere
    }
    Exact(const Exact&) = delete;
    ~Exact() { std::free(base); }
    T& operator[](size_t i) { return data[i]; }
};

static uint32_t state = 1;
static uint32_t next() { return state = state * 1664525u + 1013904223u; }
static float uniform() { return (int32_t)next() * 0x1p-31f; }
static void fill(Exact<bf16>& x) {
    for (size_t i = 0; i < x.count; i++) x[i] = narrow(2 * uniform());
}
static void fill(Exact<float>& x) {
    for (size_t i = 0; i < x.count; i++) x[i] = uniform();
}

static void require(bool right, const char* what, int64_t a, int64_t b, int64_t c) {
    if (right) return;
    if (failures++ < 20) std::printf("wrong: %s %lld %lld %lld\n", what, (long long)a, (long long)b, (long long)c);
}
// Close enough for one rounding to bf16 of values of about `size`.
static bool close(double found, double truth, double size) { return std::fabs(found - truth) <= 0.01 * (size + 1e-3); }

static const int64_t TOKENS[] = {0, 1, 2, 5, 6, 7, 13, 29, 43};

// The functions for a type of elements; those of fp32 have no way to choose.
static void pack_for(const bf16* w, int64_t g, int64_t r, int64_t c, int64_t gs, int64_t o, int64_t i, bf16* to, int n) { mla_pack(w, g, r, c, gs, o, i, to, n); }
static void pack_for(const float* w, int64_t g, int64_t r, int64_t c, int64_t gs, int64_t o, int64_t i, float* to, int n) { mla_pack_fp32(w, g, r, c, gs, o, i, to, n); }
static void unpack_for(const bf16* p, int64_t gs, int64_t o, int64_t i, bf16* to, int n) { mla_unpack(p, gs, o, i, to, n); }
static void unpack_for(const float* p, int64_t gs, int64_t o, int64_t i, float* to, int n) { mla_unpack_fp32(p, gs, o, i, to, n); }
static void linear_for(const bf16* x, int64_t xt, int64_t xh, const bf16* p, const bf16* b, bf16* out, int64_t ot, int64_t oh, int64_t t, int64_t h, int64_t i, int64_t o, int wide, int n) { mla_linear(x, xt, xh, p, b, out, ot, oh, t, h, i, o, wide, n); }
static void linear_for(const float* x, int64_t xt, int64_t xh, const float* p, const float* b, float* out, int64_t ot, int64_t oh, int64_t t, int64_t h, int64_t i, int64_t o, int wide, int n) { mla_linear_fp32(x, xt, xh, p, b, out, ot, oh, t, h, i, o, wide, n); }

// A sum of `count` terms of at most `size`: rounded once to bf16, or with the error of fp32 sums alone.
template <class T>
static bool right(T found, double truth, double size, int64_t count) {
    if (sizeof(T) == sizeof(bf16)) return close(widen(found), truth, size);
    return std::fabs(widen(found) - truth) <= 6e-8 * (count + 4) * (size + 1e-30);
}

template <class T>
static void test_linear(int64_t tokens, int64_t inputs, int64_t outputs, bool biased, int wide, int threads) {
    const int64_t x_row = inputs + 2, out_row = outputs + 3;
    Exact<T> x(tokens ? (tokens - 1) * x_row + inputs : 0), weight(outputs * inputs), bias(outputs);
    Exact<T> packed(packed_size(outputs, inputs)), again(outputs * inputs);
    Exact<T> out(tokens ? (tokens - 1) * out_row + outputs : 0);
    fill(x), fill(weight), fill(bias);
    pack_for(weight.data, 0, inputs, 1, 1, outputs, inputs, packed.data, threads);
    unpack_for(packed.data, 1, outputs, inputs, again.data, threads);
    require(!std::memcmp(weight.data, again.data, weight.count * sizeof(T)), "unpack", outputs, inputs, 0);
    T untouched;
    std::memset((void*)&untouched, 0xff, sizeof(T));
    linear_for(x.data, x_row, 0, packed.data, biased ? bias.data : nullptr, out.data, out_row, 0, tokens, 1, inputs, outputs, wide, threads);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t o = 0; o < out_row && t * out_row + o < (int64_t)out.count; o++) {
            if (o >= outputs) {
                require(!std::memcmp(&out[t * out_row + o], &untouched, sizeof(T)), "beside linear", t, o, 0);
                continue;
            }
            double sum = biased ? widen(bias[o]) : 0, size = std::fabs(sum);
            for (int64_t k = 0; k < inputs; k++) {
                const double term = (double)widen(x[t * x_row + k]) * widen(weight[o * inputs + k]);
                sum += term, size = std::max(size, std::fabs(term));
            }
            require(right<T>(out[t * out_row + o], sum, size + std::fabs(sum), inputs), "linear", t, o, inputs);
        }
    cases++;
}

template <class T>
static void test_batched(int64_t tokens, int64_t heads, int64_t inputs, int64_t outputs, int wide, int threads) {
    // x is a slice of wider heads; out lies head by head.
    const int64_t x_head = inputs + 4, x_token = heads * x_head;
    Exact<T> x(tokens ? (tokens - 1) * x_token + (heads - 1) * x_head + inputs : 0), weight(heads * outputs * inputs);
    Exact<T> packed(heads * packed_size(outputs, inputs)), out(heads * tokens * outputs);
    fill(x), fill(weight);
    pack_for(weight.data, outputs * inputs, 1, outputs, heads, outputs, inputs, packed.data, threads);  // transposed
    linear_for(x.data, x_token, x_head, packed.data, (const T*)nullptr, out.data, outputs, tokens * outputs, tokens, heads, inputs, outputs, wide, threads);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t o = 0; o < outputs; o++) {
                double sum = 0, size = 0;
                for (int64_t k = 0; k < inputs; k++) {
                    const double term = (double)widen(x[t * x_token + h * x_head + k]) * widen(weight[(h * inputs + k) * outputs + o]);
                    sum += term, size = std::max(size, std::fabs(term));
                }
                require(right<T>(out[(h * tokens + t) * outputs + o], sum, size + std::fabs(sum), inputs), "batched", t, h, o);
            }
    cases++;
}

static double turned(const bf16* x, const float* angles, int64_t width, bool interleaved, int64_t k) {
    const int64_t half = width / 2, pair = interleaved ? k / 2 : k % half;
    const bool second = interleaved ? k % 2 : k >= half;
    const double a = widen(x[interleaved ? 2 * pair : pair]), b = widen(x[interleaved ? 2 * pair + 1 : pair + half]);
    return second ? a * angles[half + pair] + b * angles[pair] : a * angles[pair] - b * angles[half + pair];
}

static double normed(const bf16* x, const bf16* weight, float eps, int64_t width, int64_t k) {
    double squares = 0;
    for (int64_t i = 0; i < width; i++) squares += (double)widen(x[i]) * widen(x[i]);
    return widen(x[k]) / std::sqrt(squares / width + eps) * widen(weight[k]);
}

// The layouts of a latent and a key of such widths: plain, and one of every kind of run.
struct Stored {
    std::vector<Run> runs;
    Layout layout;

    Stored(Kind kind, int64_t latent, int64_t rotary) {
        const int64_t width = latent + rotary, tiles = (latent + 127) / 128;
        int64_t bytes = width;
        if (kind == PLAIN) bytes = 2 * width;
        if (kind == E4M3_FIXED) runs = {{latent, kind, 0, 0}, {rotary, kind, latent, 0}};
        if (kind == E4M3_POWER || kind == E4M3_ANY) {
            for (int64_t t = 0; t < tiles; t++) runs.push_back({std::min<int64_t>(128, latent - 128 * t), kind, 128 * t, latent + 4 * t});
            runs.push_back({rotary, PLAIN, latent + 4 * tiles, 0});
            bytes = latent + 4 * tiles + 2 * rotary;
        }
        if (kind == INT8) runs = {{latent, kind, 0, width}, {rotary, kind, latent, width + 4}}, bytes += 8;
        if (kind == INT8_BLOCKS) {
            for (int64_t b = 0; b < width / 32; b++) runs.push_back({32, kind, 34 * b + 2, 34 * b});
            bytes = width / 32 * 34;
        }
        layout = {runs.data(), (int64_t)runs.size(), bytes, 0.25f};
    }
    Stored(const Stored&) = delete;
    // Decode a row, whatever its layout.
    void read(const uint8_t* row, int64_t width, float* to) const {
        for (int64_t k = 0; runs.empty() && k < width; k++) to[k] = widen(load<bf16>(row + 2 * k));
        for (const Run& run : runs) decode_run(layout, run, row, to), to += run.columns;
    }
    // Write something to a row: any codes but those of NaN, and scales of about 1.
    void invent(uint8_t* row, int64_t width) const {
        for (int64_t k = 0; runs.empty() && k < width; k++) store(row + 2 * k, narrow(2 * uniform()));
        for (const Run& run : runs) {
            for (int64_t k = 0; k < run.columns; k++)
                if (run.kind == PLAIN)
                    store(row + run.codes + 2 * k, narrow(2 * uniform()));
                else
                    row[run.codes + k] = run.kind >= INT8 ? (uint8_t)(next() >> 24) : (uint8_t)(next() >> 24 & 0xbf);
            if (run.kind == INT8_BLOCKS)
                store(row + run.scale, float_to_half(0.01f + 0.005f * uniform()));
            else if (run.kind != PLAIN && run.kind != E4M3_FIXED)
                store(row + run.scale, run.kind == INT8 ? 0.01f + 0.005f * uniform() : 1 + 0.5f * uniform());
        }
    }
};

static const Kind KINDS[] = {PLAIN, E4M3_FIXED, E4M3_POWER, E4M3_ANY, INT8, INT8_BLOCKS};

// What is written is near what a plain cache would hold, and nothing else is touched.
static void test_encoded(Kind kind, int64_t tokens, int64_t latent, int64_t rotary, int threads) {
    const Stored stored(kind, latent, rotary);
    const Layout& layout = stored.layout;
    const int64_t width = latent + rotary, slots_all = 2 * tokens + 1;
    Exact<bf16> x(tokens * width), weight(latent), plain(slots_all * width);
    Exact<uint8_t> cache(slots_all * layout.bytes);
    Exact<float> angles(tokens * rotary), row(width);
    Exact<int64_t> slots(tokens);
    fill(x), fill(weight), fill(angles);
    for (int64_t t = 0; t < tokens; t++) slots[t] = 2 * t + 1;
    mla_write_latent(x.data, width, weight.data, 1e-6f, angles.data, rotary, slots.data, (uint8_t*)plain.data, nullptr, 0, 2 * width, 0, slots_all, tokens, latent, rotary, 1, threads);
    const char* wrong = mla_write_latent(x.data, width, weight.data, 1e-6f, angles.data, rotary, slots.data, cache.data, layout.runs, layout.count, layout.bytes, layout.fixed, slots_all, tokens, latent, rotary, 1, threads);
    require(!wrong, wrong, tokens, latent, rotary);
    for (int64_t t = 0; t < tokens; t++) {
        stored.read(cache.data + slots[t] * layout.bytes, width, row.data);
        for (int64_t k = 0; k < width; k++) {
            const double truth = widen(plain[slots[t] * width + k]);
            require(std::fabs(row[k] - truth) <= 0.07 * std::fabs(truth) + 0.03, "encoded", t, k, kind);
        }
    }
    for (int64_t s = 0; s < slots_all; s += 2)
        for (int64_t k = 0; k < layout.bytes; k++) require(cache[s * layout.bytes + k] == 0xff, "untouched byte", s, k, kind);
    cases++;
}

static void test_pointwise(int64_t tokens, int64_t latent, int64_t rotary, bool interleaved, int threads) {
    const int64_t width = latent + rotary, row = width + 6, heads = 3, slots_all = 2 * tokens + 1;
    Exact<bf16> x(tokens ? (tokens - 1) * row + width : 0), weight(latent), out(tokens * latent), cache(slots_all * width);
    Exact<bf16> query(tokens * heads * rotary), before(tokens * heads * rotary);
    Exact<float> angles(tokens * rotary);
    Exact<int64_t> slots(tokens);
    fill(x), fill(weight), fill(angles), fill(query);
    std::memcpy(before.data, query.data, query.count * sizeof(bf16));
    for (int64_t t = 0; t < tokens; t++) slots[t] = 2 * (tokens - 1 - t) + 1;
    mla_rms_norm(x.data, row, weight.data, 1e-6f, out.data, latent, tokens, latent, threads);
    mla_rotate(query.data, heads * rotary, rotary, angles.data, rotary, query.data, heads * rotary, rotary, tokens, heads, rotary, interleaved, threads);
    const char* wrong = mla_write_latent(x.data, row, weight.data, 1e-6f, angles.data, rotary, slots.data, (uint8_t*)cache.data, nullptr, 0, 2 * width, 0, slots_all, tokens, latent, rotary, interleaved, threads);
    require(!wrong, wrong, tokens, latent, rotary);
    for (int64_t t = 0; t < tokens; t++) {
        const bf16* written = cache.data + slots[t] * width;
        for (int64_t k = 0; k < latent; k++) {
            const double truth = normed(x.data + t * row, weight.data, 1e-6f, latent, k);
            require(close(widen(out[t * latent + k]), truth, 1), "norm", t, k, latent);
            require(out[t * latent + k] == written[k], "written norm", t, k, latent);
        }
        for (int64_t k = 0; k < rotary; k++) {
            require(close(widen(written[latent + k]), turned(x.data + t * row + latent, angles.data + t * rotary, rotary, interleaved, k), 2), "written key", t, k, rotary);
            for (int64_t h = 0; h < heads; h++) {
                const int64_t at = (t * heads + h) * rotary;
                require(close(widen(query[at + k]), turned(before.data + at, angles.data + t * rotary, rotary, interleaved, k), 2), "rotate", t, h, k);
            }
        }
    }
    for (int64_t s = 0; s < slots_all; s += 2)
        for (int64_t k = 0; k < width; k++) require(cache[s * width + k] == 0xffff, "untouched slot", s, k, width);
    cases++;
}

// Hold one row against a plain softmax over `count` keys; `key` and `value` return row j.
template <class Key, class Value>
static void check_row(const char* what, const bf16* q, int64_t key_width, int64_t value_width, int64_t count, float scale, Key key, Value value, const bf16* out, float lse) {
    std::vector<double> logits(count), sum(value_width);
    double top = -INFINITY, total = 0, norm = 0, error = 0;
    for (int64_t j = 0; j < count; j++) {
        for (int64_t k = 0; k < key_width; k++) logits[j] += (double)widen(q[k]) * widen(key(j)[k]);
        top = std::max(top, logits[j] *= scale);
    }
    for (int64_t j = 0; j < count; j++) {
        const double weight = std::exp(logits[j] - top);
        total += weight;
        for (int64_t c = 0; c < value_width; c++) sum[c] += weight * widen(value(j)[c]);
    }
    for (int64_t c = 0; c < value_width; c++) {
        const double truth = count > 0 ? sum[c] / total : 0;
        norm += truth * truth, error += (widen(out[c]) - truth) * (widen(out[c]) - truth);
    }
    require(std::sqrt(error) <= 0.01 * std::sqrt(norm), what, count, key_width, value_width);
    require(count > 0 ? close(lse, std::log(total) + top, 0.1) : lse == -INFINITY, "lse", count, key_width, value_width);
}

typedef std::vector<int64_t> Lengths;

static void test_latent(const Lengths& queries, const Lengths& keys, int64_t heads, int64_t page, int64_t latent, int64_t rotary, int threads, Kind kind = PLAIN, int64_t most = -1) {
    const Stored stored(kind, latent, rotary);
    const int64_t bytes = stored.layout.bytes;
    const int64_t width = latent + rotary, requests = (int64_t)queries.size();
    int64_t tokens = 0, columns = 1, pages = 1;
    for (int64_t b = 0; b < requests; b++) tokens += queries[b], columns = std::max(columns, (keys[b] + page - 1) / page);
    Exact<int32_t> table(requests * columns), lens(requests), starts(requests + 1);
    starts[0] = 0;
    for (int64_t b = 0; b < requests; b++) {
        lens[b] = (int32_t)keys[b], starts[b + 1] = starts[b] + (int32_t)queries[b];
        for (int64_t i = 0; i < columns; i++) table[b * columns + i] = i * page < keys[b] ? (int32_t)pages++ : 1 << 30;
    }
    for (size_t i = 0; i < table.count; i++)  // pages in falling order
        if (table[i] < pages) table[i] = (int32_t)(pages - 1 - table[i]);
    // Slots start on multiples of 8 bytes, which is as finely as memory can be poisoned.
    uint8_t* cache = (uint8_t*)std::malloc(pages * page * bytes);
    std::memset(cache, 0xff, pages * page * bytes);
    ASAN_POISON_MEMORY_REGION(cache, pages * page * bytes);
    auto index = [&](int64_t b, int64_t j) { return table[b * columns + j / page] * page + j % page; };
    std::vector<float> numbers(pages * page * width);
    for (int64_t b = 0; b < requests; b++)
        for (int64_t j = 0; j < keys[b]; j++) {
            uint8_t* const row = cache + index(b, j) * bytes;
            ASAN_UNPOISON_MEMORY_REGION(row, bytes);
            stored.invent(row, width);
            stored.read(row, width, numbers.data() + index(b, j) * width);
        }
    Exact<bf16> q(tokens * heads * width), out(tokens * heads * latent);
    Exact<float> lse(tokens * heads);
    fill(q);
    const float scale = 1 / std::sqrt((float)width);
    // Every third of the keys that a query sees is selected, from the last one back; a fifth query selects none.
    Exact<int32_t> selection(std::max<int64_t>(0, tokens * most));
    std::vector<int64_t> selected(tokens);
    for (int64_t b = 0; b < requests && most >= 0; b++)
        for (int64_t t = starts[b]; t < starts[b + 1]; t++)
            for (int64_t i = 0, seen = keys[b] - starts[b + 1] + t + 1; i < most; i++)
                if (seen > 3 * i && t % 5 != 4)
                    selection[t * most + selected[t]++] = (int32_t)(seen - 1 - 3 * i);
    // Results lie head by head.
    const char* wrong = mla_latent_attention(q.data, heads * width, width, tokens, cache, stored.layout.runs, stored.layout.count, bytes, stored.layout.fixed, pages, table.data, columns, columns, lens.data, starts.data, requests, page, heads, width, latent, scale, out.data, latent, tokens * latent, lse.data, 1, tokens, selection.data, most, most, threads);
    require(!wrong, wrong, tokens, heads, width);
    for (int64_t b = 0; b < requests; b++)
        for (int64_t t = 0; t < queries[b]; t++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t token = starts[b] + t, seen = std::max<int64_t>(0, keys[b] - queries[b] + t + 1);
                auto key = [&](int64_t j) { return numbers.data() + index(b, most < 0 ? j : selection[token * most + j]) * width; };
                check_row("latent", q.data + (token * heads + h) * width, width, latent, most < 0 ? seen : selected[token], scale, key, key, out.data + (h * tokens + token) * latent, lse[h * tokens + token]);
            }
    ASAN_UNPOISON_MEMORY_REGION(cache, pages * page * bytes);
    std::free(cache);
    cases++;
}

static void test_expanded(const Lengths& queries, const Lengths& keys, int64_t heads, int64_t key_width, int64_t value_width, bool causal, int threads) {
    int64_t tokens = 0, rows = 0, first_query = 0, first_key = 0;
    for (int64_t n : queries) tokens += n;
    for (int64_t n : keys) rows += n;
    const int64_t both = key_width + value_width;  // keys and values are slices of one projection
    Exact<bf16> q(tokens * heads * key_width), kv(rows * heads * both), out(tokens * heads * value_width);
    Exact<float> lse(tokens * heads);
    Exact<int64_t> query_lens(queries.size()), kv_lens(keys.size());
    fill(q), fill(kv);
    for (size_t s = 0; s < queries.size(); s++) query_lens[s] = queries[s], kv_lens[s] = keys[s];
    const float scale = 1 / std::sqrt((float)key_width);
    const char* wrong = mla_expanded_attention(q.data, heads * key_width, key_width, tokens, kv.data, heads * both, both, rows, kv.data + key_width, heads * both, both, heads, key_width, value_width, scale, out.data, heads * value_width, value_width, lse.data, heads, 1, query_lens.data, kv_lens.data, (int64_t)queries.size(), causal, threads);
    require(!wrong, wrong, tokens, heads, key_width);
    for (size_t s = 0; s < queries.size(); first_query += queries[s], first_key += keys[s], s++)
        for (int64_t t = 0; t < queries[s]; t++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t row = (first_query + t) * heads + h, seen = causal ? std::max<int64_t>(0, keys[s] - queries[s] + t + 1) : keys[s];
                auto key = [&](int64_t j) { return kv.data + ((first_key + j) * heads + h) * both; };
                auto value = [&](int64_t j) { return key(j) + key_width; };
                check_row("expanded", q.data + row * key_width, key_width, value_width, seen, scale, key, value, out.data + row * value_width, lse[row]);
            }
    cases++;
}

// Keys of requests, one after another in falling slots, are written and then selected; slots between them are poisoned.
static void test_index(const Lengths& queries, const Lengths& keys, int64_t heads, int64_t page, int64_t width, int64_t most, bool coded, int threads) {
    const int64_t requests = (int64_t)queries.size(), bytes = coded ? width + 4 : 2 * width;
    int64_t tokens = 0, all = 0, columns = 1;
    for (int64_t b = 0; b < requests; b++) tokens += queries[b], all += keys[b], columns = std::max(columns, (keys[b] + page - 1) / page);
    const int64_t pages = requests * columns + 1;
    Exact<bf16> k(all * width), weight(width), bias(width), q(tokens * heads * width);
    Exact<float> angles(all * width / 2), weights(tokens * heads);
    Exact<int64_t> slots(all);
    Exact<int32_t> table(requests * columns), lens(requests), starts(requests + 1), out(tokens * most);
    Exact<uint8_t> cache(pages * page * bytes);
    fill(k), fill(weight), fill(bias), fill(q), fill(angles), fill(weights);
    starts[0] = 0;
    for (int64_t b = 0, at = 0; b < requests; b++) {
        lens[b] = (int32_t)keys[b], starts[b + 1] = starts[b] + (int32_t)queries[b];
        for (int64_t i = 0; i < columns; i++) table[b * columns + i] = i * page < keys[b] ? (int32_t)(pages - 1 - b * columns - i) : 1 << 30;
        for (int64_t j = 0; j < keys[b]; j++) slots[at++] = table[b * columns + j / page] * page + j % page;
    }
    const char* wrong = mla_write_index_key(k.data, width, weight.data, bias.data, 1e-6f, angles.data, width / 2, slots.data, cache.data, pages, page, coded, all, width, width / 2, 1, threads);
    require(!wrong, "index key, refused", all, width, coded);
    wrong = mla_select_latents(q.data, heads * width, width, tokens, weights.data, heads, cache.data, coded, pages, page, table.data, columns, columns, lens.data, starts.data, requests, heads, width, out.data, most, most, threads);
    require(!wrong, "select, refused", tokens, width, coded);
    const auto number = [&](int64_t slot, int64_t c) -> double {
        const uint8_t* from = cache.data + slot / page * page * bytes;
        if (!coded) return widen(load<bf16>(from + 2 * (slot % page * width + c)));
        uint8_t code[PART] = {from[slot % page * width + c]};
        return e4m3_part(code)[0] * load<float>(from + page * width + slot % page * 4);
    };
    for (int64_t b = 0, at = 0; b < requests; at += keys[b++])
        for (int64_t t = starts[b]; t < starts[b + 1]; t++) {
            const int64_t seen = std::max<int64_t>(0, keys[b] - starts[b + 1] + t + 1), count = std::min(seen, most);
            std::vector<double> score(seen);
            for (int64_t j = 0; j < seen; j++)
                for (int64_t h = 0; h < heads; h++) {
                    double sum = 0;
                    for (int64_t c = 0; c < width; c++) sum += widen(q[(t * heads + h) * width + c]) * number(slots[at + j], c);
                    score[j] += weights[t * heads + h] * std::max(0.0, sum);
                }
            std::vector<double> best(score);
            std::sort(best.begin(), best.end(), std::greater<>());
            for (int64_t i = 0; i < most; i++) {
                const int32_t place = out[t * most + i];
                require(i < count ? place >= 0 && place < seen && (!i || place > out[t * most + i - 1]) : place == -1, "place", t, i, place);
                if (i < count && place >= 0 && place < seen) require(score[place] >= best[count - 1] - 1e-3, "selected", t, i, place);
            }
        }
    cases++;
}

// Two products, the second of what the first gives, made from records that end where they must.
static void test_recorded(int64_t tokens, int64_t width, int threads) {
    Exact<bf16> x(tokens * width), weight(width * width), packed(packed_size(width, width)), bias(width);
    Exact<bf16> middle(tokens * width), out(tokens * width), expected(tokens * width);
    fill(x), fill(weight), fill(bias);
    mla_pack(weight.data, 0, width, 1, 1, width, width, packed.data, threads);
    mla_linear(x.data, width, 0, packed.data, bias.data, middle.data, width, 0, tokens, 1, width, width, 0, threads);
    mla_linear(middle.data, width, 0, packed.data, nullptr, expected.data, width, 0, tokens, 1, width, width, 0, threads);
    std::memset(middle.data, 0xff, tokens * width * sizeof(bf16));
    const Slot linear = (Slot)mla_recorded("mla_linear");
    const Slot given[] = {
        linear, 14, (Slot)x.data, width, 0, (Slot)packed.data, (Slot)bias.data, (Slot)middle.data, width, 0, tokens, 1, width, width, 0, -1,
        linear, 14, (Slot)middle.data, width, 0, (Slot)packed.data, 0, (Slot)out.data, width, 0, tokens, 1, width, width, 0, -1};
    Exact<Slot> records(sizeof given / sizeof *given);
    std::memcpy(records.data, given, sizeof given);
    require(!mla_run_recorded(records.data, 2, threads), "recorded, refused", tokens, width, threads);
    require(!std::memcmp(out.data, expected.data, tokens * width * sizeof(bf16)), "recorded", tokens, width, threads);
    require(!mla_recorded("mla_pack"), "mla_pack is not to be recorded", 0, 0, 0);
    cases++;
}

// Ask Linux for AMX tiles, where they are real ones.
static bool tiles_allowed() {
#if MLA_TILES && !defined(MLA_EMULATE_TILES)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return true;
#endif
}

int main() {
    if (!tiles_allowed()) return std::puts("Linux refuses AMX tiles"), 2;
    // Candidates of parts fill what a merge keeps to the last one; first, as memory grows to the largest use.
    test_index({3}, {10240}, 1, 64, 16, 34, false, 3), test_index({3}, {34816}, 1, 64, 16, 5, false, 9);
    for (int64_t tokens : TOKENS) {
        for (int64_t outputs : {1, 16, 33, 70, 130}) {
            for (int wide : {0, 1}) test_linear<bf16>(tokens, 6, outputs, outputs % 2, wide, 2);
            test_linear<float>(tokens, 7, outputs, outputs % 2, 0, 2);
        }
        for (int wide : {0, 1}) test_batched<bf16>(tokens, 3, 10, 37, wide, 2);
        test_batched<float>(tokens, 3, 9, 37, 0, 2);
        test_pointwise(tokens, 16, 32, tokens % 2, 2);
    }
    for (int wide : {0, 1}) {
        test_linear<bf16>(31, 2050, 17, true, wide, 1);
        test_linear<bf16>(9, 4100, 200, true, wide, 2);
        test_linear<bf16>(200, 8, 40, false, wide, 3);
        test_batched<bf16>(180, 2, 1030, 17, wide, 2);
    }
    test_linear<float>(31, 2051, 17, true, 0, 2);
    test_linear<float>(230, 300, 40, false, 0, 3);
    test_pointwise(700, 80, 64, true, 2);  // enough that several threads take part
    for (int threads : {1, 2, 3}) {
        for (int64_t page : {1, 16, 24, 64})
            test_latent({1, 1, 3, 0, 1, 2, 1, 1, 1, 1}, {127, 128, 129, 5, 0, 1, 64, 255, 256, 257}, 5, page, 32, 4, threads);
        test_latent({1}, {1700}, 17, 64, 64, 32, threads);
        test_latent({1, 2}, {288, 320}, 33, 16, 64, 6, threads);  // whole steps of keys, and columns that are left
        test_latent({40, 2}, {40, 130}, 2, 16, 32, 4, threads);
        for (bool causal : {true, false}) {
            test_expanded({1, 4, 0, 3, 2}, {127, 129, 3, 1, 0}, 2, 6, 32, causal, threads);
            test_expanded({290, 17}, {290, 245}, 1, 10, 128, causal, threads);
        }
    }
    for (Kind kind : KINDS) {
        test_encoded(kind, 5, 64, 64, 1);
        test_encoded(kind, 700, 160, 32, 2);  // enough that several threads take part
        // Rows of such widths take a multiple of 8 bytes.
        for (int threads : {1, 2}) test_latent({1, 1, 3, 1, 1}, {127, 72, 129, 1, 257}, 5, 16, 96, 32, threads, kind);
        test_latent({1, 40}, {300, 40}, 17, 24, 160, 96, 2, kind);
        for (int64_t heads = 1; heads <= 9; heads++) test_latent({1}, {126 + heads}, heads, heads, 160, 96, 1, kind);
    }
    test_latent({2}, {77}, 3, 1, 160, 4, 1, E4M3_ANY), test_latent({2}, {77}, 3, 1, 64, 8, 1, INT8);  // ends of runs
    for (int threads : {1, 3})
        for (bool coded : {false, true}) {
            test_index({1, 1, 3, 0, 1, 1}, {127, 72, 129, 5, 0, 257}, 5, 16, 32, 40, coded, threads);
            test_index({2, 9}, {4100, 20}, 17, 24, 16, 1100, coded, threads);
            test_index({1, 2}, {300, 1}, 33, 1, 48, 1, coded, threads);
            for (int64_t heads : {32, 64, 96}) test_index({1, 3}, {700, 330}, heads, 16, 128, 40, coded, threads);  // whole pieces
        }
    for (int64_t most : {0, 1, 50, 300}) test_latent({1, 1, 3, 0, 9}, {127, 0, 129, 5, 700}, 5, 16, 32, 4, 2, PLAIN, most);
    test_latent({2, 1}, {300, 900}, 130, 24, 96, 32, 3, E4M3_ANY, 257);
    for (int threads : {1, 2}) test_recorded(7, 34, threads);
    test_latent({1, 1}, {60, 130}, 128, 16, 96, 8, 2);
    std::printf("%d cases, %d wrong\n", cases, failures);
    return failures != 0;
}
