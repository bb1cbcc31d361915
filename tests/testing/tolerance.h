// Tolerances that are derived, not guessed. A computed sum of n products of floats differs from the
// exact one by at most gamma(n) * sum |a||b| whatever its order (Higham, Accuracy and Stability of
// Numerical Algorithms, 2002, section 3.1), and storing the result adds half a unit in the last
// place of its type. Tests pass sums of magnitudes that the oracle computed beside the value.
#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "dsv4/dtype.h"

namespace dsv4::testing {

/// Unit roundoff: the largest relative error of one rounding to nearest.
inline constexpr double kRoundoffF32 = 0x1p-24;
inline constexpr double kRoundoffBf16 = 0x1p-8;

/// n u / (1 - n u): relative growth of n roundings in float.
double gamma(double roundings);

/// Error of a float dot product or sum of `length` terms against the exact one; `magnitude` is sum
/// |a||b|. One rounding per product and per addition, in any order.
double dot_bound(int64_t length, double magnitude);

/// Extra error of a dot product of `length` terms in the E4M3 matrix unit of sm_90. It multiplies
/// exactly and adds with few bits: every instruction takes 32 products and the sum so far, aligns
/// these 33 addends to the largest of them and drops what lies 13 bits or more below its leading
/// bit (the accumulator keeps about 14 bits; numerics.md, open questions). The largest addend is at
/// most `magnitude` = sum |a||b|.
double e4m3_unit_bound(int64_t length, double magnitude);

/// Largest error of one rounding to `dtype` of a number that is within `slack` of `value`: half a
/// unit in the last place there (kF32, kBf16), zero for exact types.
double rounding_bound(DType dtype, double value, double slack = 0);

/// Collects element comparisons; reports the worst one. "Worst" is the largest error / bound.
class Comparison {
 public:
  /// `what` names the compared quantity in messages.
  explicit Comparison(std::string what) : what_(std::move(what)) {}
  /// Two infinities of one sign are equal; NaN never is, on either side. A negative bound is an
  /// error of the test and fails.
  void add(std::initializer_list<int64_t> coordinates, double actual, double expected,
           double bound);
  int64_t count() const { return count_; }
  /// Largest error / bound seen: how much of the tolerance is used.
  double worst_ratio() const { return worst_ratio_; }
  /// Fails when an element is out of bounds, or when nothing was compared.
  ::testing::AssertionResult result() const;

 private:
  std::string what_;
  int64_t count_ = 0;
  int64_t failures_ = 0;
  double worst_ratio_ = -1;
  std::vector<int64_t> coordinates_;
  double actual_ = 0, expected_ = 0, bound_ = 0;
};

/// |actual[i] - expected[i]| <= fraction * max |expected|, for comparisons with stored float32
/// results whose own error is known only as a fraction of the largest value.
::testing::AssertionResult close_to_largest(const std::string& what, std::span<const double> actual,
                                            std::span<const double> expected, double fraction);

}  // namespace dsv4::testing
