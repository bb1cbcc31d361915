// The two NVIDIA backends as data, the same in builds with and without CUDA but for
// `architectures`.
#pragma once
#include <string>

#include "dsv4/backend.h"

namespace dsv4::nvidia {

/// FLASHMLA_SPARSE_DSV4: packed fp8_ds_mla pages.
const AttentionDescriptor& flashmla_descriptor();
/// FLASHINFER_MLA_SPARSE_DSV4: plain bf16 or per-tensor FP8 rows.
const AttentionDescriptor& flashinfer_descriptor();

/// Why neither runs here: not built, no driver, no device. Empty when a device is there.
std::string why_not_here();

}  // namespace dsv4::nvidia
