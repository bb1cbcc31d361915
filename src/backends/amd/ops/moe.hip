// Entries of moe.
#include "backends/amd/ops/moe_ops.h"

#include "backends/amd/entries.h"

DSV4_AMD_ENTRIES(amd::install_moe)
