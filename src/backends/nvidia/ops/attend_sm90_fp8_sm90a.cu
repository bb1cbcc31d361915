// sm90_attend for fp8 rows.
#include "backends/nvidia/ops/attend_sm90.cuh"

template void dsv4::nvidia::launch_attend_sm90<dsv4::KvFormat::kFp8>(const AttendSm90Args&, int,
                                                                     cudaStream_t);
