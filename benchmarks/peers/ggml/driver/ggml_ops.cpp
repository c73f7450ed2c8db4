// The peer's ops through the public interface of ggml, as ik_llama.cpp and llama.cpp have it.
#include "ops.h"

#include "ggml.h"
#if __has_include("ggml-cpu.h")  // llama.cpp has moved the CPU's part there
#include "ggml-cpu.h"
#define LLAMA_CPP 1
#else
#define LLAMA_CPP 0
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

namespace peer {
namespace {

constexpr int KEY_STEP = 32;   // the kernels take whole blocks of keys, and leave out what is over
constexpr int MASK_ROWS = 64;  // a mask has at least so many rows, and a multiple of it
constexpr size_t HUGE_PAGE = size_t{2} << 20;

int padded(int size, int to) { return (size + to - 1) / to * to; }

ggml_type type_of(const std::string &name) {
  for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
    const char *known = ggml_type_name(static_cast<ggml_type>(type));
    if (known && name == known) return static_cast<ggml_type>(type);
  }
  throw std::runtime_error("this ggml has no type '" + name + "'");
}

// llama.cpp and ik_llama.cpp differ in how many arguments these two take.
template <typename Plan>
ggml_cplan plan(Plan function, ggml_cgraph *graph, int threads) {
  if constexpr (std::is_invocable_v<Plan, ggml_cgraph *, int>) {
    return function(graph, threads);
  } else {
    return function(graph, threads, nullptr);
  }
}

template <typename Convert>
void convert(Convert function, ggml_type type, const float *from, void *to, int64_t rows, int64_t columns) {
  if constexpr (std::is_invocable_v<Convert, ggml_type, const float *, void *, int64_t, int64_t, int64_t, const float *>) {
    function(type, from, to, 0, rows, columns, nullptr);
  } else {
    function(type, from, to, 0, rows, columns, nullptr, nullptr);
  }
}

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};

// A graph whose nodes do not depend on each other, its tensors in memory of their own.
class Graph : public Work {
 public:
  explicit Graph(int nodes) {
    const size_t tensors = size_t{8} * nodes * ggml_tensor_overhead();
    context_ = ggml_init({tensors + ggml_graph_overhead_custom(size_t{16} * nodes, false), nullptr, true});
    if (!context_) throw std::runtime_error("ggml_init failed");
    graph_ = ggml_new_graph_custom(context_, size_t{16} * nodes, false);
  }
  ~Graph() override { ggml_free(context_); }

  ggml_context *context() { return context_; }

  // Return a tensor with memory of its own, which large ones get in huge pages if the system has them.
  ggml_tensor *tensor(ggml_type type, int64_t a, int64_t b, int64_t c = 1) {
    return with_memory(ggml_new_tensor_3d(context_, type, a, b, c));
  }

  void add(ggml_tensor *output) { ggml_build_forward_expand(graph_, outputs_.emplace_back(with_memory(output))); }

  void finish(int threads) {
    plan_ = plan(ggml_graph_plan, graph_, threads);
    plan_.work_data = static_cast<uint8_t *>(memory(plan_.work_size));
  }

  void compute() override {
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS) throw std::runtime_error("ggml could not compute");
  }

  std::vector<float> result() const override {
    std::vector<float> values;
    for (const ggml_tensor *output : outputs_) {
      const auto append = [&](const auto *data) { values.insert(values.end(), data, data + ggml_nelements(output)); };
      output->type == GGML_TYPE_I32 ? append(static_cast<const int32_t *>(output->data)) : append(static_cast<const float *>(output->data));
    }
    return values;
  }

  void forget_result() override {
    for (ggml_tensor *output : outputs_) {
      std::fill_n(static_cast<float *>(output->data), ggml_nelements(output), std::numeric_limits<float>::quiet_NaN());
    }
  }

 private:
  ggml_tensor *with_memory(ggml_tensor *tensor) {
    tensor->data = memory(ggml_nbytes(tensor));
    return tensor;
  }

  void *memory(size_t bytes) {
    const size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    const size_t whole = (std::max(bytes, size_t{1}) + alignment - 1) / alignment * alignment;
    memory_.emplace_back(std::aligned_alloc(alignment, whole));
    if (!memory_.back()) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (bytes >= HUGE_PAGE) madvise(memory_.back().get(), whole, MADV_HUGEPAGE);  // as ours does
#endif
    std::memset(memory_.back().get(), 0, whole);
    return memory_.back().get();
  }

  ggml_context *context_;
  ggml_cgraph *graph_;
  ggml_cplan plan_{};
  std::vector<ggml_tensor *> outputs_;
  std::vector<std::unique_ptr<void, Free>> memory_;
};

// Attention of some requests in one call: their keys one after another, each in whole blocks.
void add_call(Graph &graph, const Attention &one, const std::vector<int> &lengths, const float *q, const float *keys) {
  const int requests = lengths.size();
  int total = 0;
  for (const int length : lengths) total += padded(length, KEY_STEP);
  const ggml_type type = type_of(one.type);
  const int mask_rows = padded(requests, MASK_ROWS);
  ggml_tensor *queries = graph.tensor(GGML_TYPE_F32, one.width, requests, one.heads);
  ggml_tensor *k = graph.tensor(type, one.width, total);
  ggml_tensor *mask = graph.tensor(GGML_TYPE_F16, total, mask_rows);
  std::vector<float> seen(size_t(total) * mask_rows, -INFINITY);
  int first = 0;
  for (int request = 0; request < requests; ++request) {
    convert(ggml_quantize_chunk, type, keys, static_cast<char *>(k->data) + first * k->nb[1], lengths[request], one.width);
    std::fill_n(seen.begin() + size_t(request) * total + first, lengths[request], 0.f);
    for (int head = 0; head < one.heads; ++head) {
      auto *row = static_cast<float *>(queries->data) + (size_t(head) * requests + request) * one.width;
      std::copy_n(q + (size_t(request) * one.heads + head) * one.width, one.width, row);
    }
    keys += size_t(lengths[request]) * one.width;
    first += padded(lengths[request], KEY_STEP);
  }
  ggml_fp32_to_fp16_row(seen.data(), static_cast<ggml_fp16_t *>(mask->data), seen.size());
  ggml_tensor *v = ggml_view_3d(graph.context(), k, one.value_width, total, 1, k->nb[1], k->nb[2], 0);
  graph.add(ggml_flash_attn_ext(graph.context(), queries, k, v, mask, one.scale, 0.f, 0.f));
}

// An indexer of one request: ik_llama.cpp selects, llama.cpp scores. ik_llama.cpp shares a query among threads if its keys
// are whole blocks; those that fill them up are masked.
void add_indexer(Graph &graph, const Selection &one, int length, const float *q, const float *keys, const float *weights) {
#if LLAMA_CPP
  const int total = length;
#else
  const int total = padded(length, KEY_STEP);
#endif
  const ggml_type type = type_of(one.type);
  ggml_tensor *k = graph.tensor(type, one.width, LLAMA_CPP ? 1 : total, LLAMA_CPP ? total : 1);
  ggml_tensor *queries = graph.tensor(GGML_TYPE_F32, one.width, one.heads);
  ggml_tensor *w = graph.tensor(GGML_TYPE_F32, one.heads, 1);
  ggml_tensor *mask = graph.tensor(GGML_TYPE_F16, total, 1);
  convert(ggml_quantize_chunk, type, keys, k->data, length, one.width);
  std::copy_n(q, one.heads * one.width, static_cast<float *>(queries->data));
  std::copy_n(weights, one.heads, static_cast<float *>(w->data));
  std::vector<float> seen(total, -INFINITY);
  std::fill_n(seen.begin(), length, 0.f);
  ggml_fp32_to_fp16_row(seen.data(), static_cast<ggml_fp16_t *>(mask->data), total);
#if LLAMA_CPP
  graph.add(ggml_lightning_indexer(graph.context(), queries, k, w, mask));
#else
  graph.add(ggml_indexer_topk(graph.context(), k, queries, w, mask, GGML_UNARY_OP_RELU, one.most));
#endif
}

bool has_bf16() { return ggml_cpu_has_avx512_bf16(); }

std::string instructions() {
  const std::pair<const char *, int> known[] = {
      {"avx", ggml_cpu_has_avx()},         {"avx2", ggml_cpu_has_avx2()},
      {"fma", ggml_cpu_has_fma()},         {"f16c", ggml_cpu_has_f16c()},
      {"avx512", ggml_cpu_has_avx512()},   {"avx512_vnni", ggml_cpu_has_avx512_vnni()},
      {"avx512_bf16", has_bf16()},         {"neon", ggml_cpu_has_neon()},
  };
  std::string names;
  for (const auto &[name, has] : known) names += has ? (names.empty() ? "" : "+") + std::string(name) : "";
  return names.empty() ? "none" : names;
}

}  // namespace

std::string describe() {
#if LLAMA_CPP
  const std::string name = "llama.cpp", caches = "f16,bf16,q8_0", weights = "f16,bf16,f32", index = "f16,bf16 selects=no";
#else  // ends the process for a bf16 cache without AVX512-BF16; its packed weights need these instructions too
  const std::string name = "ik_llama.cpp", caches = has_bf16() ? "f16,bf16,q8_0" : "f16,q8_0";
  const std::string weights = has_bf16() ? "f16,bf16,bf16_r16,f32" : "f16,bf16,f32";
  const std::string index = "f16,q8_0 selects=yes";
#endif
  return "peer=" + name + " instructions=" + instructions() + " caches=" + caches + " weights=" + weights + " index=" + index;
}

std::unique_ptr<Work> make(const Attention &one, const std::vector<float> &q, const std::vector<float> &keys, int threads) {
  const bool unified = one.layout == "unified";
  if (!unified && one.layout != "separate") throw std::runtime_error("unknown layout '" + one.layout + "'");
  auto graph = std::make_unique<Graph>(unified ? 1 : one.lengths.size());
  if (unified) {
    add_call(*graph, one, one.lengths, q.data(), keys.data());
  } else {
    size_t first = 0;
    for (size_t request = 0; request < one.lengths.size(); ++request) {
      const float *own = q.data() + request * one.heads * one.width;
      add_call(*graph, one, {one.lengths[request]}, own, keys.data() + first * one.width);
      first += one.lengths[request];
    }
  }
  graph->finish(threads);
  return graph;
}

std::unique_ptr<Work> make(const Selection &one, const std::vector<float> &q, const std::vector<float> &keys,
                           const std::vector<float> &weights, int threads) {
  auto graph = std::make_unique<Graph>(one.lengths.size());
  const float *first = keys.data();
  for (size_t request = 0; request < one.lengths.size(); ++request) {
    const size_t head = request * one.heads;
    add_indexer(*graph, one, one.lengths[request], &q[head * one.width], first, &weights[head]);
    first += size_t(one.lengths[request]) * one.width;
  }
  graph->finish(threads);
  return graph;
}

std::unique_ptr<Work> make(const Product &one, const std::vector<float> &weight, const std::vector<float> &x, int threads) {
  auto graph = std::make_unique<Graph>(1);
  const ggml_type type = type_of(one.type);
  ggml_tensor *w = graph->tensor(type, one.inputs, one.outputs);
  convert(ggml_quantize_chunk, type, weight.data(), w->data, one.outputs, one.inputs);
  ggml_tensor *rows = graph->tensor(GGML_TYPE_F32, one.inputs, one.rows);
  std::memcpy(rows->data, x.data(), x.size() * sizeof(float));
  graph->add(ggml_mul_mat(graph->context(), w, rows));
  graph->finish(threads);
  return graph;
}

}  // namespace peer
