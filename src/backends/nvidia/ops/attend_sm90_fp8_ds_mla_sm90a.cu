// sm90_attend for fp8_ds_mla rows.
#include "backends/nvidia/ops/attend_sm90.cuh"

template void dsv4::nvidia::launch_attend_sm90<dsv4::KvFormat::kFp8DsMla, false, false>(
    const AttendSm90Args&, int, cudaStream_t);
template void dsv4::nvidia::launch_attend_sm90<dsv4::KvFormat::kFp8DsMla, true, false>(
    const AttendSm90Args&, int, cudaStream_t);
template void dsv4::nvidia::launch_attend_sm90<dsv4::KvFormat::kFp8DsMla, false, true>(
    const AttendSm90Args&, int, cudaStream_t);
