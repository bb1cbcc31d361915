// Tensors by formula, so that real geometry can be tested without real weights: the rule of
// tests/golden/data/manifest.json, "flash_attention".
#pragma once
#include <cmath>
#include <cstdint>
#include <string_view>

#include "tests/oracle/arrays.h"
#include "tests/oracle/numbers.h"

namespace oracle {

class Formula {
 public:
  Formula(std::string_view name, uint64_t seed) {
    uint64_t hash = 0xcbf29ce484222325u;  // fnv1a64
    for (char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
    key_ = hash ^ (seed * kGamma);
  }
  /// u(i) in (-1, 1).
  double uniform(int64_t i) const {
    uint64_t z = key_ + static_cast<uint64_t>(i + 1) * kGamma;  // splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return static_cast<double>(2 * (z >> 40) + 1) * 0x1p-24 - 1;
  }
  float value(int64_t i, double scale, double offset) const {
    return static_cast<float>(round_bf16(round_f32(offset + scale * uniform(i))));
  }

 private:
  static constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;
  uint64_t key_;
};

}  // namespace oracle
