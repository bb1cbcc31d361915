// cos and sin of a token's rotary angles (attention.md 3), computed once per token and operation.
#pragma once
#include <cstdint>

#include "backends/cpu/ops/rowwise_kernels.h"
#include "ops/ops.h"

namespace dsv4::cpu {

enum class RopeDirection : uint8_t { kForward, kInverse };

/// Table of one position on the stack; a repeated position is not computed again.
class RopeAngles {
 public:
  static constexpr int32_t kMaxPairs = 256;

  explicit RopeAngles(const RopeView& rope, RopeDirection direction = RopeDirection::kForward);
  /// angle_i = f32(position) * frequency_i, rounded to f32; cos and sin of that number in double,
  /// rounded to f32: accurate for any angle. The result lives until the next call.
  const RopeTable& at(int64_t position);

 private:
  const float* frequencies_;
  bool inverse_;
  int64_t position_ = -1;
  RopeTable table_;
  float cos_[kMaxPairs];
  float sin_[kMaxPairs];
};

}  // namespace dsv4::cpu
