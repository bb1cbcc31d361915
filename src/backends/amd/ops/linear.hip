// Device entries of linear.h and linear_any.h.
#include "backends/amd/ops/linear.h"

#include "backends/amd/ops/linear_any.h"

DSV4_AMD_KERNEL(linear_stream_16, dsv4::amd::LinearStream16)
DSV4_AMD_KERNEL(linear_stream_64, dsv4::amd::LinearStream64)
DSV4_AMD_KERNEL(linear_tile_128, dsv4::amd::LinearTile128)
DSV4_AMD_KERNEL(linear_any, dsv4::amd::LinearAny)
DSV4_AMD_KERNEL(linear_prepare, dsv4::amd::LinearPrepare)
