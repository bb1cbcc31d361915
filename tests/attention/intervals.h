// Interval arithmetic over the steps of the layer: every number that a float implementation may
// compute lies between two bounds, and quantisation, being monotone for a given scale, maps bounds
// to bounds. So a value next to a rounding tie is allowed both codes, and all others exactly one.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "tests/oracle/fp8_sums.h"
#include "tests/oracle/layer_parts.h"
#include "tests/oracle/numbers.h"
#include "tests/testing/tolerance.h"

namespace dsv4::testing {

/// Bounds of a matrix, element by element.
struct Interval {
  oracle::Matrix lo, hi;

  Interval() = default;
  Interval(int64_t rows, int64_t cols) : lo(rows, cols), hi(rows, cols) {}
  explicit Interval(const oracle::Matrix& exact) : lo(exact), hi(exact) {}
  int64_t rows() const { return lo.rows; }
  int64_t cols() const { return lo.cols; }
  double middle(int64_t r, int64_t c) const { return (lo.row(r)[c] + hi.row(r)[c]) / 2; }
  double radius(int64_t r, int64_t c) const { return (hi.row(r)[c] - lo.row(r)[c]) / 2; }
  double largest(int64_t r, int64_t c) const {
    return std::max(std::abs(lo.row(r)[c]), std::abs(hi.row(r)[c]));
  }
  void set(int64_t r, int64_t c, double value, double error) {
    lo.row(r)[c] = value - error;
    hi.row(r)[c] = value + error;
  }
};

inline oracle::Matrix middles(const Interval& x) {
  oracle::Matrix out(x.rows(), x.cols());
  for (size_t i = 0; i < out.values.size(); ++i) {
    out.values[i] = (x.lo.values[i] + x.hi.values[i]) / 2;
  }
  return out;
}

/// Sum of a block of products on FP8 tensor cores for any x between two bounds: the exact one is
/// `middle` within `spread`, and an instruction drops less than a unit of each of its 33 addends
/// and of the result (fp8_sums.h).
struct Fp8BlockSum {
  double middle = 0, spread = 0, error = 0;
};
inline Fp8BlockSum fp8_block_sum(std::span<const double> x_lo, std::span<const double> x_hi,
                                 std::span<const float> w) {
  Fp8BlockSum out;
  for (size_t begin = 0; begin < w.size(); begin += oracle::kFp8InstructionCols) {
    double largest = std::abs(out.middle) + out.spread + out.error;
    for (size_t k = begin; k < std::min(begin + oracle::kFp8InstructionCols, w.size()); ++k) {
      const double number = std::abs(static_cast<double>(w[k]));
      largest = std::max(largest, std::max(std::abs(x_lo[k]), std::abs(x_hi[k])) * number);
      out.middle += (x_lo[k] + x_hi[k]) / 2 * static_cast<double>(w[k]);
      out.spread += (x_hi[k] - x_lo[k]) / 2 * number;
    }
    largest = std::max(largest, std::abs(out.middle) + out.spread + out.error);
    out.error += 34 * std::ldexp(largest, -oracle::kFp8SumBits);
  }
  return out;
}

/// Product with weights, `groups` of them side by side (1: an ordinary linear); the float sum of n
/// products is off by gamma(n) sum |x| |w|, n = the columns of a group.
inline Interval interval_linear(const Interval& x, const oracle::Weight& w, int groups = 1) {
  oracle::Weight magnitude = w;
  for (float& value : magnitude.values) value = std::abs(value);
  oracle::Matrix spread(x.rows(), x.cols());
  const double float_error = gamma(static_cast<double>(w.cols) + 2);
  for (int64_t r = 0; r < x.rows(); ++r) {
    for (int64_t c = 0; c < x.cols(); ++c) {
      spread.row(r)[c] = x.radius(r, c) + float_error * x.largest(r, c);
    }
  }
  const oracle::Matrix values = oracle::grouped_linear(middles(x), w, groups);
  const oracle::Matrix errors = oracle::grouped_linear(spread, magnitude, groups);
  Interval out(values.rows, values.cols);
  for (size_t i = 0; i < values.values.size(); ++i) {
    out.lo.values[i] = values.values[i] - errors.values[i];
    out.hi.values[i] = values.values[i] + errors.values[i];
  }
  return out;
}

/// The same on FP8 tensor cores (Products::kFp8): a block of 128 columns whose x is certain has one
/// sum. Adding blocks rounds once each.
inline Interval interval_fp8_linear(const Interval& x, const oracle::Weight& w, int groups = 1) {
  const int64_t rank = w.rows / groups;
  Interval out(x.rows(), w.rows);
  for (int64_t t = 0; t < x.rows(); ++t) {
    for (int64_t r = 0; r < w.rows; ++r) {
      const int64_t first = r / rank * w.cols;
      double lo = 0, hi = 0;
      for (int64_t block = 0; block < w.cols; block += oracle::kFp8BlockCols) {
        const int64_t count = std::min(oracle::kFp8BlockCols, w.cols - block);
        const auto at = static_cast<size_t>(first + block), size = static_cast<size_t>(count);
        const auto x_lo = x.lo.row(t).subspan(at, size), x_hi = x.hi.row(t).subspan(at, size);
        const auto numbers = w.row(r).subspan(static_cast<size_t>(block), size);
        double middle = 0, radius = 0;
        if (std::ranges::equal(x_lo, x_hi)) {
          middle = oracle::fp8_block(x_lo, numbers);
        } else {
          const Fp8BlockSum sum = fp8_block_sum(x_lo, x_hi, numbers);
          middle = sum.middle;
          radius = sum.spread + sum.error;
        }
        lo = oracle::round_f32(lo + middle - radius);
        hi = oracle::round_f32(hi + middle + radius);
      }
      out.lo.row(t)[r] = lo;
      out.hi.row(t)[r] = hi;
    }
  }
  return out;
}

/// One rounding to `dtype` (kF32, kBf16).
inline void interval_round(Interval& x, DType dtype) {
  double (*const round)(double) = dtype == DType::kBf16 ? oracle::round_bf16 : oracle::round_f32;
  for (double& value : x.lo.values) value = round(value);
  for (double& value : x.hi.values) value = round(value);
}

/// Columns [begin, begin + count) of row r: weight * x / sqrt(mean(x^2) + eps). In float the mean
/// is off by gamma(n), its root by half of that; eps, root, reciprocal and two products follow.
inline void interval_rms_norm(Interval& x, int64_t r, int64_t begin, int64_t count,
                              std::span<const float> weight, double eps) {
  double least = 0, most = 0;
  for (int64_t c = begin; c < begin + count; ++c) {
    const double lo = x.lo.row(r)[c], hi = x.hi.row(r)[c];
    const double nearest = lo > 0 ? lo : hi < 0 ? -hi : 0;
    least += nearest * nearest;
    most += x.largest(r, c) * x.largest(r, c);
  }
  const double n = static_cast<double>(count);
  const std::array<double, 2> rms{std::sqrt(least / n + eps), std::sqrt(most / n + eps)};
  const double float_error = gamma(n / 2 + 8);
  for (int64_t c = begin; c < begin + count; ++c) {
    const double w = weight.empty() ? 1.0 : static_cast<double>(weight[c - begin]);
    const double a = w * x.lo.row(r)[c], b = w * x.hi.row(r)[c];
    const auto [lo, hi] = std::minmax({a / rms[0], a / rms[1], b / rms[0], b / rms[1]});
    x.lo.row(r)[c] = lo - float_error * std::abs(lo);
    x.hi.row(r)[c] = hi + float_error * std::abs(hi);
  }
}

/// Rotation of the pairs that end at column `end`: cosine and sine, a product and a sum are rounded
/// in float, on top of what oracle::rotate_tail does.
inline void interval_rotate(Interval& x, int64_t r, int64_t end, std::span<const float> frequencies,
                            int64_t position, int direction = 1) {
  const int64_t begin = end - 2 * static_cast<int64_t>(frequencies.size());
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const int64_t c = begin + 2 * static_cast<int64_t>(i);
    const double angle = static_cast<double>(static_cast<float>(position) * frequencies[i]);
    const double cosine = std::cos(angle), sine = direction * std::sin(angle);
    const double even = x.middle(r, c), odd = x.middle(r, c + 1);
    const double d_even = x.radius(r, c), d_odd = x.radius(r, c + 1);
    const double float_error = gamma(4) * (x.largest(r, c) + x.largest(r, c + 1));
    x.set(r, c, even * cosine - odd * sine,
          d_even * std::abs(cosine) + d_odd * std::abs(sine) + float_error);
    x.set(r, c + 1, odd * cosine + even * sine,
          d_odd * std::abs(cosine) + d_even * std::abs(sine) + float_error);
  }
}

/// Orthonormal Hadamard transform of columns [begin, begin + count): log2(count) additions and one
/// product per element.
inline void interval_hadamard(Interval& x, int64_t r, int64_t begin, int64_t count) {
  oracle::Vector values;
  double radii = 0, magnitude = 0;
  for (int64_t c = begin; c < begin + count; ++c) {
    values.push_back(x.middle(r, c));
    radii += x.radius(r, c);
    magnitude += x.largest(r, c);
  }
  oracle::hadamard(values);
  const double n = static_cast<double>(count);
  const double error = (radii + gamma(std::log2(n) + 3) * magnitude) / std::sqrt(n);
  for (int64_t c = 0; c < count; ++c) x.set(r, begin + c, values[static_cast<size_t>(c)], error);
}

/// Columns in blocks that share a power-of-two scale (E4M3: qmax 448, E2M1: qmax 6). Where the
/// bounds leave the scale open, the result covers each.
inline void interval_quantise(Interval& x, int64_t block, double qmax, double amax_floor) {
  const auto quantise = [&](double value, int exponent) {
    const double scaled = std::ldexp(value, -exponent);
    const double code = qmax == 6 ? oracle::e2m1_decode(oracle::e2m1_encode(scaled))
                                  : oracle::e4m3_decode(oracle::e4m3_encode(scaled));
    return std::ldexp(code, exponent);
  };
  for (int64_t r = 0; r < x.rows(); ++r) {
    for (int64_t begin = 0; begin < x.cols(); begin += block) {
      const int64_t end = std::min(begin + block, x.cols());
      double least = amax_floor, most = amax_floor;
      for (int64_t c = begin; c < end; ++c) {
        const double lo = x.lo.row(r)[c], hi = x.hi.row(r)[c];
        least = std::max({least, lo, -hi});
        most = std::max(most, x.largest(r, c));
      }
      const int first = oracle::scale_exponent(least, qmax);
      const int last = oracle::scale_exponent(most, qmax);
      for (int64_t c = begin; c < end; ++c) {
        double &lo = x.lo.row(r)[c], &hi = x.hi.row(r)[c];
        double new_lo = quantise(lo, first), new_hi = quantise(hi, first);
        for (int exponent = first + 1; exponent <= last; ++exponent) {
          new_lo = std::min(new_lo, quantise(lo, exponent));
          new_hi = std::max(new_hi, quantise(hi, exponent));
        }
        lo = new_lo;
        hi = new_hi;
      }
    }
  }
}

/// Pooled entries of all of v, s [T, coff * width] (compressor.md 1.3). The logarithm of a weight
/// is off by the error d of its score, by the roundings of s + ape and of s - max and by the
/// exponential (2 ulp); a normalised weight by exp(2 d). The sums round once per term.
inline Interval interval_pool(const Interval& v, const Interval& s, int ratio, bool overlap,
                              int64_t width) {
  const int64_t slots = int64_t{overlap ? 2 : 1} * ratio;
  Interval out(v.rows() / ratio, width);
  for (int64_t j = 0; j < out.rows(); ++j) {
    const int64_t last = (j + 1) * ratio - 1;
    const int64_t first = std::max<int64_t>(0, last - slots + 1);
    for (int64_t c = 0; c < width; ++c) {
      const auto channel = [&](int64_t t) { return overlap && t > last - ratio ? width + c : c; };
      double top = -std::numeric_limits<double>::infinity();
      for (int64_t t = first; t <= last; ++t) top = std::max(top, s.middle(t, channel(t)));
      double sum = 0, weighted = 0, magnitude = 0, spread = 0, log_error = 0;
      for (int64_t t = first; t <= last; ++t) {
        const int64_t k = channel(t);
        const double p = std::exp(s.middle(t, k) - top);
        sum += p;
        weighted += p * v.middle(t, k);
        magnitude += p * v.largest(t, k);
        spread += p * v.radius(t, k);
        log_error = std::max(
            log_error, s.radius(t, k) + kRoundoffF32 * (s.largest(t, k) + top - s.middle(t, k)));
      }
      const double count = static_cast<double>(last - first + 1);
      const double relative = std::expm1(2 * (log_error + 4 * kRoundoffF32)) + 2 * gamma(count + 3);
      out.set(j, c, weighted / sum, (spread * (1 + relative) + relative * magnitude) / sum);
    }
  }
  return out;
}

}  // namespace dsv4::testing
