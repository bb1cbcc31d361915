// sm90_attend for bf16 rows.
#include "backends/nvidia/ops/attend_sm90.cuh"

namespace dsv4::nvidia {

template void launch_attend_sm90<KvFormat::kBf16, false, false, false>(const AttendSm90Args&, int,
                                                                       cudaStream_t);
template void launch_attend_sm90<KvFormat::kBf16, true, false, false>(const AttendSm90Args&, int,
                                                                      cudaStream_t);
template void launch_attend_sm90<KvFormat::kBf16, false, true, false>(const AttendSm90Args&, int,
                                                                      cudaStream_t);
template void launch_attend_sm90<KvFormat::kBf16, false, false, true>(const AttendSm90Args&, int,
                                                                      cudaStream_t);
template void launch_attend_sm90<KvFormat::kBf16, true, false, true>(const AttendSm90Args&, int,
                                                                     cudaStream_t);
template void launch_attend_sm90<KvFormat::kBf16, false, true, true>(const AttendSm90Args&, int,
                                                                     cudaStream_t);

}  // namespace dsv4::nvidia
