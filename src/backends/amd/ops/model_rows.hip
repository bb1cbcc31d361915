// Entries of the model's row-wise kernels that all GPUs share.
#include "backends/gpu/model_rows_ops.h"

#include "backends/amd/entries.h"

DSV4_AMD_ENTRIES(gpu::install_model_rows)
