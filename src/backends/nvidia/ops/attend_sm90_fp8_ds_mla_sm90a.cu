// sm90_attend for fp8_ds_mla rows.
#include "backends/nvidia/ops/attend_sm90.cuh"

template void dsv4::nvidia::launch_attend_sm90<dsv4::KvFormat::kFp8DsMla>(const AttendSm90Args&,
                                                                          int, cudaStream_t);
