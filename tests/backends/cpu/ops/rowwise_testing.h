// Shared by the tests of the row-wise operations: repeatable numbers, a scratch arena, every usable
// candidate of the family with 1, 2 and 3 threads.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/candidates.h"
#include "core/numbers.h"
#include "core/thread_pool.h"
#include "ops/ops.h"

namespace dsv4::cpu::testing {

constexpr double kF32Eps = 0x1p-24;  // half an ulp of f32, relative
constexpr double kBf16Eps = 0x1p-8;  // half an ulp of bf16, relative (the mantissa has 8 bits)

inline std::vector<float> random_floats(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = normal(generator);
  return out;
}

/// Memory of a tensor with its element type; remembers nothing else.
struct Storage {
  std::vector<std::byte> bytes;
  DType dtype = DType::kF32;

  Storage() = default;
  Storage(DType dtype_, const std::vector<float>& values) : dtype(dtype_) {
    bytes.resize(values.size() * static_cast<size_t>(size_of(dtype)));
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kBf16) {
        reinterpret_cast<uint16_t*>(bytes.data())[i] = f32_to_bf16(values[i]);
      } else {
        reinterpret_cast<float*>(bytes.data())[i] = values[i];
      }
    }
  }
  Storage(DType dtype_, int64_t count)
      : bytes(static_cast<size_t>(count * size_of(dtype_)), std::byte{0x5a}), dtype(dtype_) {}

  size_t size() const { return bytes.size() / static_cast<size_t>(size_of(dtype)); }
  float operator[](int64_t i) const {
    const auto at = static_cast<size_t>(i);
    return dtype == DType::kBf16 ? bf16_to_f32(reinterpret_cast<const uint16_t*>(bytes.data())[at])
                                 : reinterpret_cast<const float*>(bytes.data())[at];
  }
  Tensor view(std::initializer_list<int64_t> shape) { return Tensor(bytes.data(), dtype, shape); }
};

/// Runs operations of one candidate with a given number of threads.
class Runner {
 public:
  static constexpr int64_t kScratchBytes = 64 << 20;

  Runner(std::string name, int threads)
      : label_(name + " with " + std::to_string(threads) + " threads"),
        pool_(threads),
        memory_(new std::byte[kScratchBytes]),  // not cleared: operations must not rely on it
        arena_(memory_.get(), kScratchBytes) {
    for (const Candidate& candidate : rowwise_candidates()) {
      if (candidate.name == name) candidate.install(ops_);
    }
    ops_.gather_rows = gather_rows;
    ops_.expand_plan = expand_plan;
    ops_.moe = moe;
  }
  const std::string& label() const { return label_; }
  Ops& ops() { return ops_; }
  OpContext context() { return {{&pool_}, &arena_, &ops_}; }
  const Arena& arena() const { return arena_; }

 private:
  std::string label_;
  ThreadPool pool_;
  std::unique_ptr<std::byte[]> memory_;
  Arena arena_;
  Ops ops_;
};

/// `run` returns the bytes of its results; all usable candidates and thread counts must give the
/// same ones, which are returned.
inline std::vector<std::byte> same_bytes_everywhere(
    const std::function<std::vector<std::byte>(Runner&)>& run) {
  std::vector<std::byte> first;
  std::string first_label;
  for (const Candidate& candidate : rowwise_candidates()) {
    if (!candidate.why_not().empty()) continue;
    for (int threads : {1, 2, 3}) {
      Runner runner(std::string(candidate.name), threads);
      std::vector<std::byte> bytes = run(runner);
      EXPECT_EQ(runner.arena().used(), 0) << runner.label();
      if (first_label.empty()) {
        first = std::move(bytes);
        first_label = runner.label();
      } else if (bytes != first) {
        ADD_FAILURE() << runner.label() << " differs from " << first_label;
      }
    }
  }
  return first;
}

/// The bytes of several results, one after the other.
inline std::vector<std::byte> bytes_of(std::initializer_list<const Storage*> parts) {
  size_t total = 0;
  for (const Storage* part : parts) total += part->bytes.size();
  std::vector<std::byte> out(total);
  size_t at = 0;
  for (const Storage* part : parts) {
    std::memcpy(out.data() + at, part->bytes.data(), part->bytes.size());
    at += part->bytes.size();
  }
  return out;
}

/// Reads the next part of a byte string that `bytes_of` made.
inline Storage read(const std::vector<std::byte>& bytes, size_t& at, DType dtype, int64_t count) {
  Storage out(dtype, count);
  std::memcpy(out.bytes.data(), bytes.data() + at, out.bytes.size());
  at += out.bytes.size();
  return out;
}

}  // namespace dsv4::cpu::testing
