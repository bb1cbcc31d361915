// Entries of top_k.
#include "backends/amd/ops/index_ops.h"

#include "backends/amd/entries.h"

DSV4_AMD_ENTRIES(amd::install_top_k)
