// Indexer scores on AVX2 with FMA and F16C: f32 operands throughout, bits as AVX-512 gives them.
// See index_logits.h.
#include "backends/cpu/ops/index_logits_mxfp4-inl.h"

namespace dsv4::cpu {
namespace {

// 4 keys x 2 registers: 8 chains = latency 4 x 2 ports.
using Wide = WideIndexKernel<Lanes8, 16, 8>;
using Mxfp4 = Mxfp4IndexKernel<Lanes8, Wide, 4>;

}  // namespace

const IndexKernels& index_avx2_kernels() {
  static const IndexKernels kernels{nullptr, &kIndexKernel<Wide>, &kIndexKernel<Mxfp4>};
  return kernels;
}

}  // namespace dsv4::cpu
