// Indexer scores on AVX-512: f32 operands throughout, with the bits of VDPBF16PS. See
// index_logits.h.
#include "backends/cpu/ops/index_logits_mxfp4-inl.h"

namespace dsv4::cpu {
namespace {

// 64 heads: 4 keys x 4 registers, per dim 4 loads, 4 broadcasts and 16 FMA.
using Wide = WideIndexKernel<Lanes16, 64, 16>;
using Mxfp4 = Mxfp4IndexKernel<Lanes16, Wide, 8>;

}  // namespace

const IndexKernels& index_avx512_kernels() {
  static const IndexKernels kernels{nullptr, &kIndexKernel<Wide>, &kIndexKernel<Mxfp4>};
  return kernels;
}

}  // namespace dsv4::cpu
