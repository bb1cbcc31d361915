// sm90_attend for bf16 rows.
#include "backends/nvidia/ops/attend_sm90.cuh"

template void dsv4::nvidia::launch_attend_sm90<dsv4::KvFormat::kBf16>(const AttendSm90Args&, int,
                                                                      cudaStream_t);
