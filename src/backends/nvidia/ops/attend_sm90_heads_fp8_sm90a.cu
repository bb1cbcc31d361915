// sm90_attend_heads for fp8 rows.
#include "backends/nvidia/ops/attend_sm90_heads.cuh"

template void dsv4::nvidia::launch_attend_sm90_heads<dsv4::KvFormat::kFp8, 16>(
    const AttendSm90Args&, const HandOvers&, int, cudaStream_t);
template void dsv4::nvidia::launch_attend_sm90_heads<dsv4::KvFormat::kFp8, 32>(
    const AttendSm90Args&, const HandOvers&, int, cudaStream_t);
