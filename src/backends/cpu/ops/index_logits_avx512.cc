// Indexer scores on AVX-512: f32 operands throughout, with the bits of VDPBF16PS. See
// index_logits.h.
#include "backends/cpu/ops/index_logits_mxfp4-inl.h"
#include "backends/cpu/ops/index_logits_wide-inl.h"

namespace dsv4::cpu {
namespace {

// 64 heads: 4 keys x 4 registers, per dim 4 loads, 4 broadcasts and 16 FMA.
using Wide = WideIndexKernel<Lanes16, 64, 16>;
constexpr IndexKernel kWide{
    .elem_bytes = 4, .pack_q = Wide::pack_q, .load_keys = Wide::load_keys, .score = Wide::score};
using Mxfp4 = Mxfp4IndexKernel<Lanes16, Wide, 8>;
constexpr IndexKernel kMxfp4{.elem_bytes = Mxfp4::kElemBytes,
                             .pack_q = Mxfp4::pack_q,
                             .load_keys = Mxfp4::load_keys,
                             .score = Mxfp4::score};

}  // namespace

const IndexKernels& index_avx512_kernels() {
  static const IndexKernels kernels{nullptr, &kWide, &kMxfp4};
  return kernels;
}

}  // namespace dsv4::cpu
