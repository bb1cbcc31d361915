// Random numbers that are the same on every machine and standard library: splitmix64 and plain
// arithmetic (std:: distributions are not portable).
#pragma once
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace dsv4::testing {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// In [0, n).
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  /// Uniform in (-1, 1), a multiple of 2^-24.
  double uniform() { return static_cast<double>(2 * (bits() >> 40) + 1) * 0x1p-24 - 1; }
  /// Mean 0, variance 1: a sum of twelve uniforms, tails cut at 6, enough for test data.
  double normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum / 2;
  }
  std::vector<float> normals(int64_t count, double scale) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& value : out) value = static_cast<float>(scale * normal());
    return out;
  }
  /// A random order of 0 .. n-1.
  std::vector<int32_t> permutation(int32_t n) {
    std::vector<int32_t> out(static_cast<size_t>(n));
    for (int32_t i = 0; i < n; ++i) out[static_cast<size_t>(i)] = i;
    for (int32_t i = n - 1; i > 0; --i) {
      std::swap(out[static_cast<size_t>(i)], out[static_cast<size_t>(below(i + 1))]);
    }
    return out;
  }

 private:
  uint64_t state_;
};

}  // namespace dsv4::testing
