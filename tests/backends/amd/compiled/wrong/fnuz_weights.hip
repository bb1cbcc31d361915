// Weights read as the chip's own FP8 numbers: half of OCP's on gfx942, and -0 is NaN.
#include "backends/amd/instructions.h"

namespace dsv4::amd {
struct ChipCodes {
  static constexpr float kUnit = 1.0f;
  DSV4_DEVICE static uint32_t of(uint32_t codes) { return codes; }
  template <bool kUpper>
  DSV4_DEVICE static FloatPair pair(uint32_t codes) {
    return platform::e4m3_pair<kUpper>(codes);
  }
};
}  // namespace dsv4::amd

#define OcpCodes ChipCodes
#include "backends/amd/ops/linear.h"

namespace dsv4::gpu {
template __attribute__((global)) void amd_entry<amd::LinearStream16>(const amd::LinearBatch);
}  // namespace dsv4::gpu
