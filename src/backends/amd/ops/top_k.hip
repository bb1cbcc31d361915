// Device entry of top_k.h.
#include "backends/amd/ops/top_k.h"

DSV4_AMD_KERNEL(top_k, dsv4::amd::TopK)
