#include "backends/amd/amd.h"

#include "backends/amd/descriptors.h"
#include "backends/amd/rocm_aiter_attention.h"

namespace dsv4::amd {

std::vector<BackendEntry> backend_entries() {
  return {{&rocm_aiter_descriptor(), why_not_here, RocmAiterAttention::create}};
}

}  // namespace dsv4::amd
