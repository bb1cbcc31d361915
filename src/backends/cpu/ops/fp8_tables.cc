#include "backends/cpu/ops/fp8_tables.h"

#include <bit>
#include <cmath>
#include <memory>

#include "core/numbers.h"

namespace dsv4::cpu {
namespace {

// bf16 bits of magnitude * 2^(scale - 127), by the rules of the header. Exact: E4M3 has 4
// significant bits, bf16 has 8.
uint16_t scaled_bf16(float magnitude, int scale) {
  constexpr uint16_t kNan = 0x7fc0, kInfinity = 0x7f80;
  if (std::isnan(magnitude) || scale == 255) return kNan;
  const double value = std::ldexp(static_cast<double>(magnitude), scale - 127);
  if (value < 0x1p-126) return 0;
  if (value >= 0x1p128) return kInfinity;
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16);
}

std::unique_ptr<const Fp8Tables> make_tables() {
  auto tables = std::make_unique<Fp8Tables>();
  for (int code = 0; code < 128; ++code) {
    const float magnitude = e4m3_to_f32(static_cast<uint8_t>(code));
    for (int scale = 0; scale < 256; ++scale) {
      const uint16_t bits = scaled_bf16(magnitude, scale);
      tables->bytes[scale][code] = static_cast<uint8_t>(bits >> 8);
      tables->bytes[scale][128 + code] = static_cast<uint8_t>(bits & 0xff);
    }
  }
  return tables;
}

}  // namespace

const Fp8Tables& fp8_tables() {
  static const std::unique_ptr<const Fp8Tables> tables = make_tables();
  return *tables;
}

}  // namespace dsv4::cpu
