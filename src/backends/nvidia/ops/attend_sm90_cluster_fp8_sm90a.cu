// sm90_attend_cluster for fp8 rows.
#include "backends/nvidia/ops/attend_sm90_cluster.cuh"

namespace dsv4::nvidia {
template int attend_sm90_clusters<KvFormat::kFp8, 2>();
template int attend_sm90_clusters<KvFormat::kFp8, 4>();
template int attend_sm90_clusters<KvFormat::kFp8, 8>();
template void launch_attend_sm90_cluster<KvFormat::kFp8, 2>(const AttendSm90Args&, cudaStream_t);
template void launch_attend_sm90_cluster<KvFormat::kFp8, 4>(const AttendSm90Args&, cudaStream_t);
template void launch_attend_sm90_cluster<KvFormat::kFp8, 8>(const AttendSm90Args&, cudaStream_t);
}  // namespace dsv4::nvidia
