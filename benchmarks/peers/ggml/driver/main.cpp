// Answers commands on stdin until it is closed. A command is a line of words, then fp32 operands as they lie in
// memory; an answer is a line that starts with "ok" or "error", then an fp32 result.
//
//   describe
//   attention ID THREADS TYPE LAYOUT HEADS WIDTH VALUE_WIDTH SCALE REQUESTS LENGTH...   + q, keys
//   selection ID THREADS TYPE HEADS WIDTH MOST REQUESTS LENGTH...                     + q, keys, weights
//   product ID THREADS TYPE ROWS INPUTS OUTPUTS                                         + weight, x
//   time ID UNTIMED TIMED      -> ok NANOSECONDS...
//   result ID                  -> ok COUNT, then the result of a call made for it
//   forget ID
#include "ops.h"

#include <chrono>
#include <iostream>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace {

std::map<int, std::unique_ptr<peer::Work>> works;

template <typename T>
T word(std::istream &line) {
  T value;
  if (!(line >> value)) throw std::runtime_error("the command ends too early");
  return value;
}

std::vector<float> operand(size_t count) {
  std::vector<float> values(count);
  std::cin.read(reinterpret_cast<char *>(values.data()), count * sizeof(float));
  if (!std::cin) throw std::runtime_error("an operand ends too early");
  return values;
}

peer::Work &known(int id) {
  const auto found = works.find(id);
  if (found == works.end()) throw std::runtime_error("there is no work " + std::to_string(id));
  return *found->second;
}

std::vector<int> lengths_of(std::istream &line) {
  std::vector<int> lengths(word<int>(line));
  for (int &length : lengths) length = word<int>(line);
  return lengths;
}

std::string make_attention(std::istream &line) {
  const int id = word<int>(line), threads = word<int>(line);
  peer::Attention one;
  one.type = word<std::string>(line), one.layout = word<std::string>(line);
  one.heads = word<int>(line), one.width = word<int>(line), one.value_width = word<int>(line);
  one.scale = word<float>(line);
  one.lengths = lengths_of(line);
  const auto q = operand(one.lengths.size() * one.heads * one.width);
  const auto keys = operand(std::accumulate(one.lengths.begin(), one.lengths.end(), size_t{0}) * one.width);
  works[id] = peer::make(one, q, keys, threads);
  return "ok";
}

std::string make_selection(std::istream &line) {
  const int id = word<int>(line), threads = word<int>(line);
  peer::Selection one;
  one.type = word<std::string>(line);
  one.heads = word<int>(line), one.width = word<int>(line), one.most = word<int>(line);
  one.lengths = lengths_of(line);
  const size_t heads = one.lengths.size() * one.heads;
  const auto q = operand(heads * one.width);
  const auto keys = operand(std::accumulate(one.lengths.begin(), one.lengths.end(), size_t{0}) * one.width);
  works[id] = peer::make(one, q, keys, operand(heads), threads);
  return "ok";
}

std::string make_product(std::istream &line) {
  const int id = word<int>(line), threads = word<int>(line);
  peer::Product one;
  one.type = word<std::string>(line);
  one.rows = word<int>(line), one.inputs = word<int>(line), one.outputs = word<int>(line);
  const auto weight = operand(size_t(one.outputs) * one.inputs), x = operand(size_t(one.rows) * one.inputs);
  works[id] = peer::make(one, weight, x, threads);
  return "ok";
}

std::string time_calls(std::istream &line) {
  auto &work = known(word<int>(line));
  const int untimed = word<int>(line), timed = word<int>(line);
  std::vector<long long> taken(timed);
  for (int call = 0; call < untimed; ++call) work.compute();
  for (auto &nanoseconds : taken) {
    const auto start = std::chrono::steady_clock::now();
    work.compute();
    nanoseconds = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  }
  std::string answer = "ok";
  for (const auto nanoseconds : taken) answer += " " + std::to_string(nanoseconds);
  return answer;
}

std::string carry_out(const std::string &command, std::istream &line, std::vector<float> &result) {
  if (command == "describe") return "ok " + peer::describe();
  if (command == "attention") return make_attention(line);
  if (command == "selection") return make_selection(line);
  if (command == "product") return make_product(line);
  if (command == "time") return time_calls(line);
  if (command == "forget") return works.erase(word<int>(line)) ? "ok" : "error there is no such work";
  if (command != "result") return "error unknown command '" + command + "'";
  auto &work = known(word<int>(line));
  work.forget_result();
  work.compute();
  result = work.result();
  return "ok " + std::to_string(result.size());
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    std::vector<float> result;
    std::string command, answer;
    line >> command;
    try {
      answer = carry_out(command, line, result);
    } catch (const std::exception &error) {
      answer = std::string("error ") + error.what();
    }
    std::cout << answer << '\n';
    std::cout.write(reinterpret_cast<const char *>(result.data()), result.size() * sizeof(float));
    std::cout.flush();
  }
}
