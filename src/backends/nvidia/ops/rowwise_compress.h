// Compressor step on NVIDIA: Ops::compress. Kernels: rowwise_compress.cu.
#pragma once
#include "ops/ops.h"

namespace dsv4::nvidia {

void compress(const CompressParams& params, const OpContext& context);

}  // namespace dsv4::nvidia
