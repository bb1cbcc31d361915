// The AMD backend as data. Its kernels are not part of this version.
#pragma once
#include <string>

#include "dsv4/backend.h"

namespace dsv4::amd {

/// ROCM_FLASHMLA_SPARSE_DSV4: packed fp8_ds_mla pages, output projection in bf16.
const AttentionDescriptor& rocm_aiter_descriptor();

/// Why it does not run here: not built, no kernels, no runtime, no device.
std::string why_not_here();

}  // namespace dsv4::amd
