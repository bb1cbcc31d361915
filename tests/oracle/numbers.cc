#include "tests/oracle/numbers.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace oracle {
namespace {

// Nearest multiple of 2^exponent, ties to even. Exact: dividing by a power of two does not round,
// and nearbyint rounds to even in the default mode.
double round_to_multiple(double value, int exponent) {
  return std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
}

// A binary format of `precision` significant bits, smallest normal 2^min_exponent, largest finite
// `max_finite`; what rounds beyond it is infinite.
double round_binary(double value, int precision, int min_exponent, double max_finite) {
  if (value == 0.0 || !std::isfinite(value)) return value;
  int exponent;  // |value| in [2^(exponent-1), 2^exponent)
  std::frexp(value, &exponent);
  const double rounded =
      round_to_multiple(value, std::max(exponent - 1, min_exponent) - (precision - 1));
  if (std::abs(rounded) > max_finite)
    return std::copysign(std::numeric_limits<double>::infinity(), value);
  return rounded;
}

// Index of the entry of the ascending table nearest to `magnitude`, ties to the even index: codes
// of both formats ascend with their value, so an even code has an even mantissa. One of the two
// entries around `magnitude` is the nearest; numbers_test compares with a search over all codes.
uint8_t nearest_code(double magnitude, const Vector& table) {
  const auto above = std::lower_bound(table.begin(), table.end(), magnitude);
  const auto high = static_cast<size_t>(std::min(above, table.end() - 1) - table.begin());
  const size_t low = high == 0 ? 0 : high - 1;
  const double to_low = std::abs(magnitude - table[low]);
  const double to_high = std::abs(magnitude - table[high]);
  if (to_low == to_high) return static_cast<uint8_t>(low % 2 == 0 ? low : high);
  return static_cast<uint8_t>(to_low < to_high ? low : high);
}

// Values of codes 0 .. count - 1.
Vector value_table(double (*decode)(uint8_t), int count) {
  Vector out;
  for (int code = 0; code < count; ++code) out.push_back(decode(static_cast<uint8_t>(code)));
  return out;
}

constexpr int kE4m3Finite = 0x7f;  // codes 0 .. 0x7e are finite and ascend
constexpr int kE2m1Finite = 8;
constexpr double kE4m3Largest = 448.0;
constexpr double kE2m1Largest = 6.0;

double max_abs(std::span<const double> block, double floor) {
  double amax = floor;
  for (double value : block) amax = std::max(amax, std::abs(value));
  return amax;
}

}  // namespace

double round_bf16(double value) {
  return round_binary(value, 8, -126, std::ldexp(255.0, 120));
}

double round_f32(double value) {
  return round_binary(value, 24, -126, std::ldexp(16777215.0, 104));
}

double e4m3_decode(uint8_t code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(1.0 + mantissa / 8.0, exponent - 7);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

uint8_t e4m3_encode(double value) {
  if (std::isnan(value)) return 0x7f;
  const double magnitude = std::min(std::abs(value), kE4m3Largest);
  static const Vector table = value_table(e4m3_decode, kE4m3Finite);
  const uint8_t code = nearest_code(magnitude, table);
  return static_cast<uint8_t>(code | (std::signbit(value) ? 0x80 : 0));
}

double e4m3_tie_distance(double value) {
  const double magnitude = std::abs(value);
  double best = std::numeric_limits<double>::infinity();
  for (int code = 0; code + 1 < kE4m3Finite; ++code) {
    const double low = e4m3_decode(static_cast<uint8_t>(code));
    const double high = e4m3_decode(static_cast<uint8_t>(code + 1));
    best = std::min(best, std::abs(magnitude - (low + high) / 2) / (high - low));
  }
  return best;
}

double e8m0_decode(uint8_t byte) {
  if (byte == 255) return std::numeric_limits<double>::quiet_NaN();
  return std::ldexp(1.0, byte - 127);
}

double e2m1_decode(uint8_t code) {
  const int exponent = (code >> 1) & 3, mantissa = code & 1;
  const double magnitude =
      exponent == 0 ? mantissa * 0.5 : std::ldexp(1.0 + mantissa / 2.0, exponent - 1);
  return (code & 8) != 0 ? -magnitude : magnitude;
}

uint8_t e2m1_encode(double value) {
  const double magnitude = std::min(std::abs(value), kE2m1Largest);
  static const Vector table = value_table(e2m1_decode, kE2m1Finite);
  const uint8_t code = nearest_code(magnitude, table);
  return static_cast<uint8_t>(code | (std::signbit(value) ? 8 : 0));
}

int scale_exponent(double amax, double qmax) {
  int exponent =
      std::ilogb(amax) - 10;  // qmax < 2^9: too small, so the first that fits is the smallest
  while (amax > std::ldexp(qmax, exponent)) ++exponent;
  return exponent;
}

QuantisedBlock quantise_e4m3(std::span<const double> block, double amax_floor) {
  QuantisedBlock out;
  out.exponent = scale_exponent(max_abs(block, amax_floor), kE4m3Largest);
  for (double value : block) {
    const uint8_t code = e4m3_encode(std::ldexp(value, -out.exponent));
    out.codes.push_back(code);
    out.values.push_back(std::ldexp(e4m3_decode(code), out.exponent));
  }
  return out;
}

QuantisedBlock quantise_e2m1(std::span<const double> block) {
  QuantisedBlock out;
  const double amax = max_abs(block, std::ldexp(kE2m1Largest, -126));
  out.exponent = std::clamp(scale_exponent(amax, kE2m1Largest), -127, 127);
  for (double value : block) {
    const uint8_t code = e2m1_encode(std::ldexp(value, -out.exponent));
    out.codes.push_back(code);
    out.values.push_back(std::ldexp(e2m1_decode(code), out.exponent));
  }
  return out;
}

void quantise_linear_input(std::span<double> row) {
  constexpr size_t kBlock = 128;
  for (size_t begin = 0; begin < row.size(); begin += kBlock) {
    const std::span<double> block = row.subspan(begin, std::min(kBlock, row.size() - begin));
    const QuantisedBlock quantised = quantise_e4m3(block, kLinearFloor);
    std::copy(quantised.values.begin(), quantised.values.end(), block.begin());
  }
}

KvRow quantise_kv_row(std::span<const double> row, int rope_dim) {
  constexpr size_t kTile = 64;
  Vector rounded(row.begin(), row.end());
  for (double& value : rounded) value = round_bf16(value);
  const size_t nope = row.size() - static_cast<size_t>(rope_dim);
  KvRow out;
  for (size_t begin = 0; begin < nope; begin += kTile) {
    const QuantisedBlock tile = quantise_e4m3({rounded.data() + begin, kTile}, kKvFloor);
    out.scales.push_back(static_cast<uint8_t>(std::clamp(tile.exponent + 127, 0, 255)));
    out.codes.insert(out.codes.end(), tile.codes.begin(), tile.codes.end());
    out.values.insert(out.values.end(), tile.values.begin(), tile.values.end());
  }
  out.rotated.assign(rounded.begin() + static_cast<std::ptrdiff_t>(nope), rounded.end());
  out.values.insert(out.values.end(), out.rotated.begin(), out.rotated.end());
  return out;
}

}  // namespace oracle
