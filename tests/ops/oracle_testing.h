// Shared by the oracle tests of the operations: every candidate of a family on every device, forced
// in turn, and bounds of quantised results.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "tests/oracle/layer_parts.h"
#include "tests/oracle/numbers.h"
#include "tests/testing/device_memory.h"
#include "tests/testing/op_candidates.h"
#include "tests/testing/random.h"
#include "tests/testing/tolerance.h"

namespace dsv4::testing {

/// One candidate of one family; the others of the table are the machine's best.
class CandidateTest : public ::testing::TestWithParam<OpCandidate> {
 protected:
  void SetUp() override {
    if (!GetParam().why_not.empty())
      GTEST_SKIP() << GetParam().label() << ": " << GetParam().why_not;
    OpenedCandidate opened = open_candidate(GetParam(), kThreads);
    device_ = std::move(opened.device);
    ops_ = opened.ops;
    memory_ = std::make_unique<DeviceMemory>(*device_);
  }
  void TearDown() override {
    if (memory_ == nullptr) return;  // skipped
    EXPECT_TRUE(memory_->guards_intact());
  }
  static constexpr int kThreads = 2;
  /// Does it take f32 activations and caches?
  bool exact() const { return GetParam().exact; }
  /// One number at a time: minutes where the others take seconds, so it gets fewer rows.
  bool is_scalar() const { return GetParam().label() == "cpu_reference"; }
  /// Does it run lane by lane on the CPU? Then fewer and smaller cases have to do.
  bool emulated() const {
    return GetParam().platform == Platform::kRocm && !GetParam().name.starts_with("gpu_");
  }
  Subject subject() const { return {device_.get(), &ops_}; }
  /// Runs with the scratch that Ops::scratch_bytes answers for `limits`.
  template <typename Params>
  void run(Op<Params> op, const Params& params, ScratchLimits limits) {
    limits.num_threads = kThreads;
    run_op_with(subject(), op, params, ops_.scratch_bytes(limits));
  }
  DeviceMemory& memory() { return *memory_; }
  /// Forgets what was allocated, after a look at the guards.
  void clear_memory() {
    EXPECT_TRUE(memory_->guards_intact());
    memory_ = std::make_unique<DeviceMemory>(*device_);
  }

  Ops ops_;

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<DeviceMemory> memory_;
};

inline std::string candidate_name(const ::testing::TestParamInfo<OpCandidate>& info) {
  return info.param.label();
}

inline Vector normal_values(Random& random, int64_t count, double scale) {
  Vector out(static_cast<size_t>(count));
  for (double& value : out) value = scale * random.normal();
  return out;
}

// ---- quantised results of inexact inputs -----------------------------------------------------
//
// A value that an operation quantises lies within `delta` of the oracle's. Rounding is monotone, so
// the operation's result lies between the roundings of value - delta and value + delta: they are
// equal unless a rounding tie lies in between, which is the only excuse for another code.

/// Exponents that a block with these values and errors may get.
inline std::set<int> possible_exponents(std::span<const double> values,
                                        std::span<const double> deltas, double floor, double qmax) {
  double low = floor, high = floor;
  for (size_t i = 0; i < values.size(); ++i) {
    low = std::max(low, std::abs(values[i]) - deltas[i]);
    high = std::max(high, std::abs(values[i]) + deltas[i]);
  }
  return {oracle::scale_exponent(low, qmax), oracle::scale_exponent(high, qmax)};
}

inline double e4m3_value(double value, int exponent) {
  return std::ldexp(oracle::e4m3_decode(oracle::e4m3_encode(std::ldexp(value, -exponent))),
                    exponent);
}
inline double e2m1_value(double value, int exponent) {
  return std::ldexp(oracle::e2m1_decode(oracle::e2m1_encode(std::ldexp(value, -exponent))),
                    exponent);
}

/// Is `actual` a possible rounding of a number within delta of value? `round` is monotone.
template <typename Round>
bool possible_rounding(double actual, double value, double delta, Round round) {
  return actual >= round(value - delta) && actual <= round(value + delta);
}

/// Error of y = factor * rotation of (even, odd) in float: cos and sin are rounded (1), products
/// (1) and their sum (1), and `extra` roundings of the inputs.
inline double rotation_bound(double even, double odd, double extra = 0) {
  return gamma(3 + extra) * (std::abs(even) + std::abs(odd));
}

}  // namespace dsv4::testing
