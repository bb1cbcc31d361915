// sm90_attend for fp8_ds_mla rows.
#include "backends/nvidia/ops/attend_sm90.cuh"

namespace dsv4::nvidia {

template void launch_attend_sm90<KvFormat::kFp8DsMla, false, false, false>(const AttendSm90Args&,
                                                                           int, cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8DsMla, true, false, false>(const AttendSm90Args&,
                                                                          int, cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8DsMla, false, true, false>(const AttendSm90Args&,
                                                                          int, cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8DsMla, false, false, true>(const AttendSm90Args&,
                                                                          int, cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8DsMla, true, false, true>(const AttendSm90Args&, int,
                                                                         cudaStream_t);
template void launch_attend_sm90<KvFormat::kFp8DsMla, false, true, true>(const AttendSm90Args&, int,
                                                                         cudaStream_t);

}  // namespace dsv4::nvidia
