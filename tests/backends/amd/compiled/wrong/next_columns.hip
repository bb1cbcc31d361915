// Every lane takes the columns of its right neighbour: an index is off by one piece.
#include "backends/amd/ops/weight_codes.h"

#define lane_col() (lane_col() + kLaneCols)
#include "backends/amd/ops/linear.h"

namespace dsv4::gpu {
template __attribute__((global)) void amd_entry<amd::LinearStream16>(const amd::LinearBatch);
}  // namespace dsv4::gpu
