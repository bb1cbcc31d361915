// Device entries of moe.h.
#include "backends/amd/ops/moe.h"

DSV4_AMD_KERNEL(moe_pointers, dsv4::amd::MoePointers)
DSV4_AMD_KERNEL(moe_sort, dsv4::amd::MoeSort)
DSV4_AMD_KERNEL(moe_stream_16, dsv4::amd::MoeStream16)
DSV4_AMD_KERNEL(moe_stream_64, dsv4::amd::MoeStream64)
DSV4_AMD_KERNEL(moe_tile_128, dsv4::amd::MoeTile128)
DSV4_AMD_KERNEL(moe_swiglu, dsv4::amd::MoeSwiglu)
DSV4_AMD_KERNEL(moe_combine, dsv4::amd::MoeCombine)
