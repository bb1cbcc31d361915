// What this machine can do at best: measured, because shared machines move from minute to minute.
#pragma once
#include <cstdint>

#include "core/thread_pool.h"
#include "dsv4/device.h"

namespace dsv4::cpu {

DeviceLimits measure_limits(ThreadPool& pool);

// One loop per instruction set, in files compiled for it. `iterations` rounds; the return value
// keeps the work alive. Each round does kPeakChains independent chains, enough to cover latency x
// ports.
inline constexpr int kPeakChains = 12;
float peak_f32_avx2(int64_t iterations);         // 8 lanes x FMA: 16 FLOP a chain and round
float peak_f32_avx512(int64_t iterations);       // 16 lanes x FMA: 32 FLOP
float peak_bf16_avx512bf16(int64_t iterations);  // VDPBF16PS: 64 FLOP
/// Reads `bytes` (multiple of 256) once.
uint64_t read_stream_avx512(const void* data, int64_t bytes);

}  // namespace dsv4::cpu
