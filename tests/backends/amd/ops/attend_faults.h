// attend with one mistake each, to see that tests notice.
#pragma once
#include "backends/amd/ops/attend.h"

namespace dsv4::amd::faults {

/// Codes as the chip reads them: half of the value on gfx942, and -0 is a NaN.
struct UnfixedCodes : OcpCodes {
  static constexpr float kUnit = 1.0f;
  static constexpr bool kHidesNan = false;
  DSV4_DEVICE static uint32_t of(uint32_t codes) { return codes; }
};
/// The scale of the codes is right, -0 stays.
struct MinusZeroCodes : OcpCodes {
  DSV4_DEVICE static uint32_t of(uint32_t codes) { return codes; }
};
struct UnfixedRows : Fp8DsMlaRows {
  using Codes = UnfixedCodes;
};
struct MinusZeroRows : Fp8DsMlaRows {
  using Codes = MinusZeroCodes;
};
/// Four dims further.
struct ShiftedRows : Fp8DsMlaRows {
  DSV4_DEVICE static int offset(int slice) { return 64 * slice + 4; }
};

using Unfixed = Attend<UnfixedRows, 1, false>;
using MinusZero = Attend<MinusZeroRows, 1, false>;
using Shifted = Attend<ShiftedRows, 1, false>;

}  // namespace dsv4::amd::faults
