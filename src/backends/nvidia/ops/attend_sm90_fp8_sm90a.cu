// sm90_attend for fp8 rows.
#include "backends/nvidia/ops/attend_sm90.cuh"

namespace dsv4::nvidia {

template void launch_attend_sm90<KvFormat::kFp8, false, false, false>(const AttendSm90Args&, int,
                                                                      cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8, true, false, false>(const AttendSm90Args&, int,
                                                                     cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8, false, true, false>(const AttendSm90Args&, int,
                                                                     cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8, false, false, true>(const AttendSm90Args&, int,
                                                                     cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8, true, false, true>(const AttendSm90Args&, int,
                                                                    cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8, false, true, true>(const AttendSm90Args&, int,
                                                                    cudaStream_t);

}  // namespace dsv4::nvidia
