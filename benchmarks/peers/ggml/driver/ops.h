// The ops that a peer is timed on. main.cpp drives them, ggml_ops.cpp computes them with ggml.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace peer {

// Decode attention over latents: one query token per request, its heads sharing one key/value head.
struct Attention {
  std::string type;    // of the cache
  std::string layout;  // of the requests: "separate" (a call for each) or "unified" (one call and a mask)
  int heads, width, value_width;  // the value is the first columns of the key
  float scale;
  std::vector<int> lengths;  // keys of each request
};

// out [rows, outputs] = x [rows, inputs] times weight [outputs, inputs] transposed.
struct Product {
  std::string type;  // of the weight; x and out are fp32
  int rows, inputs, outputs;
};

// What an indexer selects, one query token per request: the keys that score best, of which a score is the sum
// over heads of weight * max(0, q . k).
struct Selection {
  std::string type;  // of the keys
  int heads, width, most;
  std::vector<int> lengths;  // keys of each request
};

// An op bound to its operands: everything that comes before `compute` is not timed.
class Work {
 public:
  virtual ~Work() = default;
  virtual void compute() = 0;
  virtual std::vector<float> result() const = 0;
  virtual void forget_result() = 0;  // overwrite it with NaN
};

// What the peer is and can do: "name=value" words.
std::string describe();

// q [requests, heads, width]; keys [sum of lengths, width], one request after another.
std::unique_ptr<Work> make(const Attention &, const std::vector<float> &q, const std::vector<float> &keys, int threads);
// The same, and weights [requests, heads]. The result is positions [requests, most], or all scores if it does not select.
std::unique_ptr<Work> make(const Selection &, const std::vector<float> &q, const std::vector<float> &keys,
                           const std::vector<float> &weights, int threads);
std::unique_ptr<Work> make(const Product &, const std::vector<float> &weight, const std::vector<float> &x, int threads);

}  // namespace peer
