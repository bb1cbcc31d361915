// Entries of dense products.
#include "backends/amd/ops/linear_ops.h"

#include "backends/amd/entries.h"

DSV4_AMD_ENTRIES(amd::install_linear)
