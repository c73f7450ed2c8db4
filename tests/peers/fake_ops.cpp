// Naive ops for the driver in benchmarks/peers/ggml, so that its tests need no peer.
// FAKE_LEAVES_OUT=n forgets a request's last n keys, or its n best. Types "f16" and "q8_0" are right, "abort" ends the process.
#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>

namespace peer {
namespace {

struct Loop : Work {
  explicit Loop(size_t size) : out(size) {}
  void compute() override { call(out.data()); }
  std::vector<float> result() const override { return out; }
  void forget_result() override { out.assign(out.size(), std::numeric_limits<float>::quiet_NaN()); }
  std::vector<float> out;
  std::function<void(float *)> call;
};

void check(const std::string &type) {
  if (type == "f16" || type == "q8_0") return;
  if (type != "abort") throw std::runtime_error("no type '" + type + "'");
  std::fprintf(stderr, "this cannot be computed\n");
  std::abort();
}

int fewer() {
  const char *forgotten = std::getenv("FAKE_LEAVES_OUT");
  return forgotten ? std::atoi(forgotten) : 0;
}

float dot(const float *a, const float *b, int size) {
  float sum = 0;
  for (int i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

void attend(const Attention &one, const float *q, const float *keys, int length, float *out) {
  float total = 0;
  for (int i = 0; i < one.value_width; ++i) out[i] = 0;
  for (int key = 0; key < length; ++key, keys += one.width) {
    const float weight = std::exp(one.scale * dot(q, keys, one.width));
    total += weight;
    for (int i = 0; i < one.value_width; ++i) out[i] += weight * keys[i];
  }
  for (int i = 0; i < one.value_width; ++i) out[i] /= total;
}

}  // namespace

std::string describe() { return "peer=fake instructions=none caches=f16,q8_0 weights=f16 index=f16 selects=yes"; }

std::unique_ptr<Work> make(const Attention &one, const std::vector<float> &q, const std::vector<float> &keys, int) {
  check(one.type);
  auto loop = std::make_unique<Loop>(one.lengths.size() * one.heads * one.value_width);
  loop->call = [=](float *out) {
    const float *query = q.data(), *first = keys.data();
    for (const int length : one.lengths) {
      for (int head = 0; head < one.heads; ++head, query += one.width, out += one.value_width)
        attend(one, query, first, length - fewer(), out);
      first += size_t(length) * one.width;
    }
  };
  return loop;
}

std::unique_ptr<Work> make(const Selection &one, const std::vector<float> &q, const std::vector<float> &keys,
                           const std::vector<float> &weights, int) {
  check(one.type);
  auto loop = std::make_unique<Loop>(one.lengths.size() * one.most);
  loop->call = [=](float *out) {
    const float *query = q.data(), *key = keys.data(), *weight = weights.data();
    for (const int length : one.lengths) {
      std::vector<std::pair<float, int>> scored(length);
      for (int at = 0; at < length; ++at, key += one.width) {
        for (int head = 0; head < one.heads; ++head)
          scored[at].first -= weight[head] * std::max(0.f, dot(query + head * one.width, key, one.width));
        scored[at].second = at;
      }
      std::sort(scored.begin(), scored.end());
      for (int i = 0; i < one.most; ++i) *out++ = scored[i + fewer()].second;
      query += size_t(one.heads) * one.width, weight += one.heads;
    }
  };
  return loop;
}

std::unique_ptr<Work> make(const Product &one, const std::vector<float> &weight, const std::vector<float> &x, int) {
  check(one.type);
  auto loop = std::make_unique<Loop>(size_t(one.rows) * one.outputs);
  loop->call = [=](float *out) {
    for (int row = 0; row < one.rows; ++row)
      for (int output = 0; output < one.outputs; ++output)
        *out++ = dot(&x[size_t(row) * one.inputs], &weight[size_t(output) * one.inputs], one.inputs);
  };
  return loop;
}

}  // namespace peer
