// Device entries of index_logits.h: format of the keys x heads.
#include "backends/amd/ops/index_logits.h"

namespace dsv4::amd {
using IndexLogitsFp8x16 = IndexLogits<DType::kF8E4M3, 1>;
using IndexLogitsFp8x64 = IndexLogits<DType::kF8E4M3, 4>;
using IndexLogitsMxfp4x16 = IndexLogits<DType::kF4E2M1, 1>;
using IndexLogitsMxfp4x64 = IndexLogits<DType::kF4E2M1, 4>;
}  // namespace dsv4::amd

DSV4_AMD_KERNEL(index_logits_fp8_16, dsv4::amd::IndexLogitsFp8x16)
DSV4_AMD_KERNEL(index_logits_fp8_64, dsv4::amd::IndexLogitsFp8x64)
DSV4_AMD_KERNEL(index_logits_mxfp4_16, dsv4::amd::IndexLogitsMxfp4x16)
DSV4_AMD_KERNEL(index_logits_mxfp4_64, dsv4::amd::IndexLogitsMxfp4x64)
