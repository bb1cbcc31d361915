// The AMD chips whose compiled kernels are executed here, and where they differ.
#pragma once
#include <cstdint>

namespace dsv4::amd::isa {

enum class Arch { kGfx942, kGfx950 };

constexpr const char* arch_name(Arch arch) {
  return arch == Arch::kGfx942 ? "gfx942" : "gfx950";
}
/// Local memory of one workgroup.
constexpr uint32_t lds_limit_bytes(Arch arch) {
  return (arch == Arch::kGfx942 ? 64 : 160) * 1024;
}
/// 8-bit floats of the chip: FNUZ (bias 8, one zero, 0x80 is NaN) or OCP.
constexpr bool has_fnuz_fp8(Arch arch) {
  return arch == Arch::kGfx942;
}

inline constexpr int kWaveSize = 64;
/// Rows of the vector register file that one wave can address: v0-v255, then a0-a255.
inline constexpr int kMaxVectorRegs = 512;
inline constexpr int kFirstAccRegister = 256;

}  // namespace dsv4::amd::isa
