#include "backends/cpu/limits.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/host_memory.h"

namespace dsv4::cpu {
namespace {

double seconds_of(auto&& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Best of several rounds: a limit is what the machine can do when left alone.
double best_seconds(auto&& body) {
  double best = seconds_of(body);
  for (int i = 0; i < 6; ++i) best = std::min(best, seconds_of(body));
  return best;
}

double peak_of(ThreadPool& pool, float (*loop)(int64_t), double flops) {
  if (loop == nullptr) return 0;
  constexpr int64_t kIterations = 400000;
  const int threads = pool.num_threads();
  std::vector<float> sink(static_cast<size_t>(threads) * 16);
  const double seconds = best_seconds([&] {
    pool.run(threads, [&](int64_t i) { sink[static_cast<size_t>(i) * 16] = loop(kIterations); });
  });
  return static_cast<double>(kIterations) * flops * threads / seconds;
}

// Portable read of `bytes`, four independent sums.
uint64_t read_stream(const void* data, int64_t bytes) {
  const auto* p = static_cast<const uint64_t*>(data);
  uint64_t sum[4] = {};
  for (int64_t i = 0; i < bytes / 8; i += 4) {
    for (int64_t j = 0; j < 4; ++j) sum[j] ^= p[i + j];
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

}  // namespace

LimitLoops limit_loops() {
  LimitLoops out{read_stream, nullptr, nullptr, 0, 0};
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  if (avx512) {
    out.read = read_stream_avx512;
    out.f32 = peak_f32_avx512;
    out.f32_flops = 32 * kPeakChains;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out.f32 = peak_f32_avx2;
    out.f32_flops = 16 * kPeakChains;
  }
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    out.bf16 = peak_bf16_avx512bf16;
    out.bf16_flops = 64 * kPeakChains;
  }
#endif
  return out;
}

DeviceLimits measure_limits(ThreadPool& pool) {
  const LimitLoops loops = limit_loops();
  DeviceLimits out;
  out.f32_flops_per_second = peak_of(pool, loops.f32, loops.f32_flops);
  out.bf16_flops_per_second = peak_of(pool, loops.bf16, loops.bf16_flops);
  // A last-level cache of 32 MiB keeps a tenth of 256 MiB from round to round.
  constexpr int64_t kBytes = int64_t{1} << 30;
  const std::unique_ptr<void, decltype(&std::free)> memory(allocate_host_memory(kBytes), std::free);
  if (memory == nullptr) return out;
  std::memset(memory.get(), 1, kBytes);
  const int threads = pool.num_threads();
  const int64_t part = kBytes / threads / 256 * 256;
  std::vector<uint64_t> sink(static_cast<size_t>(threads) * 8);
  const double seconds = best_seconds([&] {
    pool.run(threads, [&](int64_t i) {
      sink[static_cast<size_t>(i) * 8] =
          loops.read(static_cast<const char*>(memory.get()) + i * part, part);
    });
  });
  out.read_bytes_per_second = static_cast<double>(part) * threads / seconds;
  return out;
}

}  // namespace dsv4::cpu
