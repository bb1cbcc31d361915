#include "backends/cpu/ops/rope.h"

#include <cmath>

#include "core/fail.h"

namespace dsv4::cpu {

RopeAngles::RopeAngles(const RopeView& rope, RopeDirection direction)
    : frequencies_(rope.frequencies), inverse_(direction == RopeDirection::kInverse) {
  DSV4_CHECK(rope.rope_dim % 2 == 0 && rope.rope_dim / 2 <= kMaxPairs);
  table_ = {cos_, sin_, rope.rope_dim / 2};
}

const RopeTable& RopeAngles::at(int64_t position) {
  if (position == position_) return table_;
  position_ = position;
  for (int32_t i = 0; i < table_.pairs; ++i) {
    const float angle = static_cast<float>(position) * frequencies_[i];
    const auto sine = static_cast<float>(std::sin(static_cast<double>(angle)));
    cos_[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
    sin_[i] = inverse_ ? -sine : sine;
  }
  return table_;
}

}  // namespace dsv4::cpu
