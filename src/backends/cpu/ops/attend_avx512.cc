// Attention on AVX-512: f32 operands throughout, with the bits of VDPBF16PS. See attend.h.
#include "backends/cpu/ops/attend_wide-inl.h"

namespace dsv4::cpu {
namespace {

// 8 rows x 2 registers and 4 heads x 4 registers: 16 chains, of which latency 4 x 2 ports needs 8;
// fewer loads per FMA than smaller tiles. 128 dims of 32 heads of q are 16 KiB.
using Wide = WideKernel<Lanes16, 32, 8, 128, 4, 4>;
constexpr AttendKernel kWide{.elem_bytes = 4,
                             .group_heads = Wide::kMaxLanes,
                             .pack_q = Wide::pack_q,
                             .attend_block = Wide::attend_block,
                             .merge = merge_lanes<Lanes16>,
                             .finish = Wide::finish};

}  // namespace

const AttendKernels& attend_avx512_kernels() {
  static const AttendKernels kernels{nullptr, &kWide};
  return kernels;
}

}  // namespace dsv4::cpu
