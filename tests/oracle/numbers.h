// Number formats by definition: values are enumerated, encoding searches for the nearest one.
// Slow, and obviously right. Source: numerics.md 1-3, compressor.md 2.4, o_proj.md 4.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "tests/oracle/arrays.h"

namespace oracle {

/// Nearest bfloat16, ties to even, subnormals and overflow to infinity included (numerics.md 2).
double round_bf16(double value);
/// Nearest IEEE binary32.
double round_f32(double value);

/// E4M3FN code -> value; 0x7f and 0xff are NaN (numerics.md 1).
double e4m3_decode(uint8_t code);
/// Nearest code, ties to the even code, saturating at 448 (numerics.md 2). NaN -> 0x7f.
uint8_t e4m3_encode(double value);
/// Distance of |value| from the nearest point where e4m3_encode changes its answer, in units of the
/// gap between the two codes there: 0 is a tie, 0.5 is exactly on a code.
double e4m3_tie_distance(double value);

/// UE8M0 byte -> 2^(byte - 127), NaN for 255.
double e8m0_decode(uint8_t byte);

/// E2M1 code (bit 3 = sign) -> value.
double e2m1_decode(uint8_t code);
/// Nearest code, ties to even, saturating at 6.
uint8_t e2m1_encode(double value);

/// Smallest e with amax <= qmax * 2^e: ceil(log2(amax / qmax)) without a logarithm (numerics.md 3).
int scale_exponent(double amax, double qmax);

/// A block of numbers that share the scale 2^exponent.
struct QuantisedBlock {
  int exponent = 0;
  std::vector<uint8_t> codes;
  Vector values;  ///< what the codes stand for, scale included
};
/// amax = max(floor, max |v|); codes of v / 2^e, e = scale_exponent(amax, 448).
QuantisedBlock quantise_e4m3(std::span<const double> block, double amax_floor);
/// As above with E2M1 (qmax 6), floor 6 * 2^-126 (compressor.md 2.4); one code per element.
QuantisedBlock quantise_e2m1(std::span<const double> block);

/// Floors of amax (numerics.md 3).
constexpr double kLinearFloor = 1e-4;
constexpr double kKvFloor = 1e-4;
constexpr double kIndexFloor = 1e-4;
constexpr double kInverseRopeFloor = 1e-10;

/// In place: what a quantised input of a linear stands for, blocks of 128 (numerics.md 4). The last
/// block may be shorter.
void quantise_linear_input(std::span<double> row);

/// A KV row in the fp8_ds_mla format (attention.md step 5, cache_layouts.md 1).
struct KvRow {
  std::vector<uint8_t> codes;   ///< one per un-rotated dim
  std::vector<uint8_t> scales;  ///< one per 64 un-rotated dims: exponent + 127
  Vector rotated;               ///< bf16 values
  Vector values;                ///< what attention reads: [head_dim]
};
/// `row` is rounded to bf16 first; its last `rope_dim` elements are the rotated ones.
KvRow quantise_kv_row(std::span<const double> row, int rope_dim);

}  // namespace oracle
