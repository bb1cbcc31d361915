// Entries of attend.h.
#include "backends/amd/ops/attend_ops.h"

#include "backends/amd/entries.h"

DSV4_AMD_ENTRIES(amd::install_attend)
