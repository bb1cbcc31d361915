// sm90_attend_cluster for bf16 rows.
#include "backends/nvidia/ops/attend_sm90_cluster.cuh"

namespace dsv4::nvidia {
template int attend_sm90_clusters<KvFormat::kBf16, 2>();
template int attend_sm90_clusters<KvFormat::kBf16, 4>();
template int attend_sm90_clusters<KvFormat::kBf16, 8>();
template void launch_attend_sm90_cluster<KvFormat::kBf16, 2>(const AttendSm90Args&, cudaStream_t);
template void launch_attend_sm90_cluster<KvFormat::kBf16, 4>(const AttendSm90Args&, cudaStream_t);
template void launch_attend_sm90_cluster<KvFormat::kBf16, 8>(const AttendSm90Args&, cudaStream_t);
}  // namespace dsv4::nvidia
