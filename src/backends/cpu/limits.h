// What this machine can do at best: measured, because shared machines move from minute to minute.
#pragma once
#include <cstdint>

#include "core/thread_pool.h"
#include "dsv4/device.h"

namespace dsv4::cpu {

DeviceLimits measure_limits(ThreadPool& pool);

/// The loops that run at a core's limits; null where the CPU lacks their instructions.
struct LimitLoops {
  uint64_t (*read)(const void* data, int64_t bytes);  // once, a multiple of 256 bytes
  float (*f32)(int64_t iterations);                   // FMA
  float (*bf16)(int64_t iterations);                  // VDPBF16PS
  double f32_flops;                                   // of an iteration
  double bf16_flops;
};
LimitLoops limit_loops();

// One loop per instruction set, in files compiled for it. The return value keeps the work alive.
// An iteration does kPeakChains independent chains, enough to cover latency x ports.
inline constexpr int kPeakChains = 12;
float peak_f32_avx2(int64_t iterations);         // 8 lanes x FMA: 16 FLOP a chain
float peak_f32_avx512(int64_t iterations);       // 16 lanes x FMA: 32 FLOP
float peak_bf16_avx512bf16(int64_t iterations);  // 64 FLOP
uint64_t read_stream_avx512(const void* data, int64_t bytes);

}  // namespace dsv4::cpu
