// Conversion of scaled E4M3 codes to bf16 by byte tables, shared by every kernel that reads FP8
// weights or cache rows.
//
// A table holds the power-of-two scale too: bf16(code * 2^(scale - 127)) for the 128 magnitudes of
// one scale byte is 256 bytes, so four zmm registers and two byte permutes (VPERMI2B) convert 64
// codes with their scale, exactly. Of the 64 KiB only the scales that occur become warm.
//
// Values leave bf16's normal range only for scale bytes outside 10..246. Then, in every kernel:
//   magnitude below 2^-126        -> zero of the same sign (VDPBF16PS flushes bf16 denormals)
//   magnitude of 2^128 and above  -> infinity
//   code 0x7f or 0xff, scale 255  -> NaN
#pragma once
#include <cstdint>

namespace dsv4::cpu {

struct Fp8Tables {
  /// bytes[scale][m] is the high byte and bytes[scale][128 + m] the low byte of the bf16 of
  /// magnitude code m (0..127). The sign bit of a code goes to the sign bit of the high byte.
  alignas(64) uint8_t bytes[256][256];

  /// bf16 bits of one code; what the vector kernels compute 64 at a time.
  uint16_t bf16(uint8_t code, uint8_t scale) const {
    const uint8_t* table = bytes[scale];
    const int magnitude = code & 0x7f;
    const int high = table[magnitude] | (code & 0x80);
    return static_cast<uint16_t>(high << 8 | table[128 + magnitude]);
  }
};

/// Built at first use (thread-safe), lives as long as the program. Fetch it once per kernel call.
const Fp8Tables& fp8_tables();

}  // namespace dsv4::cpu
