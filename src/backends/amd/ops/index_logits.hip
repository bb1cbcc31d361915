// Entries of index_logits.
#include "backends/amd/ops/index_ops.h"

#include "backends/amd/entries.h"

DSV4_AMD_ENTRIES(amd::install_index_logits)
