// The 8-bit floats of a chip: E4M3 in its FNUZ form (gfx942) or its OCP form (gfx950).
#pragma once
#include <array>
#include <cmath>
#include <cstdint>

#include "backends/amd/isa/arch.h"
#include "core/numbers.h"

namespace dsv4::amd::isa {

/// Values of all 256 codes.
inline const std::array<float, 256>& fp8_values(bool fnuz) {
  static const std::array<std::array<float, 256>, 2> tables = [] {
    std::array<std::array<float, 256>, 2> out;
    for (int code = 0; code < 256; ++code) {
      out[0][static_cast<size_t>(code)] = e4m3_to_f32(static_cast<uint8_t>(code));
      out[1][static_cast<size_t>(code)] = e4m3fnuz_to_f32(static_cast<uint8_t>(code));
    }
    return out;
  }();
  return tables[fnuz ? 1 : 0];
}

/// Nearest even. What rounds to more than the largest number becomes NaN: the hardware saturates
/// only when MODE.fp16_ovfl is set, which compiled code does not do.
inline uint8_t f32_to_fp8(float value, bool fnuz) {
  const float magnitude = std::fabs(value);
  // Half a step above the largest number: 448 + 16 goes down to it (even), 240 + 8 does not.
  if (fnuz) return magnitude < 248.0f ? f32_to_e4m3fnuz(value) : uint8_t{0x80};
  if (magnitude <= 464.0f) return f32_to_e4m3(value);
  return std::signbit(value) ? uint8_t{0xff} : uint8_t{0x7f};
}

}  // namespace dsv4::amd::isa
