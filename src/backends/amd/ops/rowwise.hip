// Entries of the row-wise kernels that all GPUs share.
#include "backends/gpu/rowwise_ops.h"

#include "backends/amd/entries.h"

DSV4_AMD_ENTRIES(gpu::install_rowwise)
