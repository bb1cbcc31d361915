#include "checkpoint/rope.h"

#include <algorithm>
#include <cmath>

#include "core/fail.h"

namespace dsv4 {
namespace {

constexpr double kTwoPi = 6.283185307179586476925286766559;

/// Pair whose wavelength makes `turns` turns over the original context.
double correction_pair(const RopeParameters& parameters, int rope_dim, double turns) {
  const double length = static_cast<double>(parameters.original_max_position);
  return rope_dim * std::log(length / (turns * kTwoPi)) / (2.0 * std::log(parameters.theta));
}

}  // namespace

std::vector<float> rope_frequencies(const RopeParameters& parameters, int rope_dim) {
  DSV4_CHECK(rope_dim > 0 && rope_dim % 2 == 0);
  const int pairs = rope_dim / 2;
  double low = 0, high = 0;
  if (parameters.yarn) {
    low = std::max(std::floor(correction_pair(parameters, rope_dim, parameters.beta_fast)), 0.0);
    high = std::min(std::ceil(correction_pair(parameters, rope_dim, parameters.beta_slow)),
                    rope_dim - 1.0);
    if (low == high) high += 0.001;
  }
  std::vector<float> out(static_cast<size_t>(pairs));
  for (int pair = 0; pair < pairs; ++pair) {
    double frequency = std::pow(parameters.theta, -2.0 * pair / rope_dim);
    if (parameters.yarn) {
      const double ramp = std::clamp((pair - low) / (high - low), 0.0, 1.0);
      frequency = frequency / parameters.factor * ramp + frequency * (1.0 - ramp);
    }
    out[static_cast<size_t>(pair)] = static_cast<float>(frequency);
  }
  return out;
}

}  // namespace dsv4
