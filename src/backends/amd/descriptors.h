// The AMD backend as data, the same in builds with and without HIP but for `architectures`.
#pragma once
#include <string>

#include "dsv4/backend.h"

namespace dsv4::amd {

/// ROCM_FLASHMLA_SPARSE_DSV4: packed fp8_ds_mla pages, output projection in bf16.
const AttentionDescriptor& rocm_aiter_descriptor();

/// Why it runs on no GPU here: not built, no runtime, no device. Empty when a device is there.
std::string why_not_here();

}  // namespace dsv4::amd
