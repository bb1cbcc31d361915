// Rows quantised by the chip's own conversion. That is E4M3 of the OCP on gfx950, and FNUZ on
// gfx942, whose codes stand for half: the fix is missing.
#include "backends/gpu/numbers.h"

namespace dsv4::gpu {
DSV4_DEVICE uint32_t e4m3_by_instruction(float even, float odd) {
  return static_cast<uint32_t>(__builtin_amdgcn_cvt_pk_fp8_f32(even, odd, 0, false)) & 0xffffu;
}
}  // namespace dsv4::gpu

#define pack_e4m3 e4m3_by_instruction
#include "backends/gpu/norm_rope.h"

namespace dsv4::gpu {
template __attribute__((global)) void
amd_entry<QnormRopeInsert<Bf16, Fp8DsMlaRows, 8, Access::kWhole>>(const QnormRopeInsertArgs);
}  // namespace dsv4::gpu
