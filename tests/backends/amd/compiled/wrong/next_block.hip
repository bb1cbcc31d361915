// Every block takes its neighbour's work: an index is off by one.
#include "backends/gpu/platform.h"

#define block_idx() (block_idx() + 1)
#include "backends/gpu/norm_rope.h"
#include "backends/gpu/plan_rows.h"

namespace dsv4::gpu {
template __attribute__((global)) void
amd_entry<QnormRopeInsert<Bf16, Fp8DsMlaRows, 8, Access::kWhole>>(const QnormRopeInsertArgs);
template __attribute__((global)) void amd_entry<GatherRows>(const GatherRowsArgs);
}  // namespace dsv4::gpu
