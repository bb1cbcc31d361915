// Indexer scores on AVX2 with FMA and F16C: f32 operands throughout, bits as AVX-512 gives them.
// See index_logits.h.
#include "backends/cpu/ops/index_logits_mxfp4-inl.h"
#include "backends/cpu/ops/index_logits_wide-inl.h"

namespace dsv4::cpu {
namespace {

// 4 keys x 2 registers: 8 chains = latency 4 x 2 ports.
using Wide = WideIndexKernel<Lanes8, 16, 8>;
constexpr IndexKernel kWide{
    .elem_bytes = 4, .pack_q = Wide::pack_q, .load_keys = Wide::load_keys, .score = Wide::score};
using Mxfp4 = Mxfp4IndexKernel<Lanes8, Wide, 4>;
constexpr IndexKernel kMxfp4{.elem_bytes = Mxfp4::kElemBytes,
                             .pack_q = Mxfp4::pack_q,
                             .load_keys = Mxfp4::load_keys,
                             .score = Mxfp4::score};

}  // namespace

const IndexKernels& index_avx2_kernels() {
  static const IndexKernels kernels{nullptr, &kWide, &kMxfp4};
  return kernels;
}

}  // namespace dsv4::cpu
