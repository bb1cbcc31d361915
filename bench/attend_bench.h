// Helpers of attend_bench, index_logits_bench and top_k_bench: clock, memory, limits of the machine
// measured in the same run, and a loop that alternates a kernel with them.
#pragma once
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cpu/candidates.h"
#include "backends/cpu/parallel.h"
#include "core/arena.h"
#include "core/fail.h"
#include "core/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsv4::cpu::bench {

struct Options {
  int threads = 2;
  std::string candidate, filter;
  clockid_t clock = CLOCK_MONOTONIC;  // with one thread on a busy machine: the thread's own time
  double seconds = 0.6;               // of one case
};

inline Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    const char* value = i + 1 < argc ? argv[++i] : "";
    if (flag == "--threads") {
      options.threads = std::max(1, std::atoi(value));
    } else if (flag == "--candidate") {
      options.candidate = value;
    } else if (flag == "--filter") {
      options.filter = value;
    } else if (flag == "--seconds") {
      options.seconds = std::atof(value);
    } else if (flag == "--clock") {
      options.clock = std::string_view(value) == "cpu" ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    } else {
      std::fprintf(stderr,
                   "%s: unknown option %s\nusage: [--threads N] [--candidate NAME] [--filter "
                   "TEXT] [--seconds S] [--clock wall|cpu]\n",
                   argv[0], argv[i]);
      std::exit(2);
    }
  }
  if (options.clock == CLOCK_THREAD_CPUTIME_ID) options.threads = 1;
  return options;
}

inline double now(const Options& options) {
  timespec time;
  clock_gettime(options.clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

/// Zeroed memory in huge pages where the system gives them; lives as long as the program.
inline std::byte* huge_bytes(int64_t bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) fail(ErrorCode::kOutOfMemory, "bench: ", bytes, " bytes");
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  std::memset(data, 0, static_cast<size_t>(bytes));
  return static_cast<std::byte*>(data);
}

#if defined(__x86_64__)
/// `rounds` x 12 VDPBF16PS on independent accumulators: 64 operations each.
__attribute__((target("avx512f,avx512bf16"), noinline)) inline float dot_rounds(int64_t rounds) {
  __m512 acc[12];
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) acc[j] = _mm512_setzero_ps();  // unrolled: else in memory
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      acc[j] = _mm512_dpbf16_ps(acc[j], x, x);
      asm volatile("" : "+v"(acc[j]));
    }
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) sum += _mm512_cvtss_f32(acc[j]);
  return sum;
}
inline bool has_dot() {
  return __builtin_cpu_supports("avx512bf16") != 0;
}
#else
inline float dot_rounds(int64_t) {
  return 0;
}
inline bool has_dot() {
  return false;
}
#endif

using Words = uint64_t __attribute__((vector_size(64), aligned(8), may_alias));
inline uint64_t read_stream(const std::byte* begin, const std::byte* end) {
  Words a{}, b{};
  for (; begin + 128 <= end; begin += 128) {
    a ^= *reinterpret_cast<const Words*>(begin);
    b ^= *reinterpret_cast<const Words*>(begin + 64);
  }
  a ^= b;
  return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

struct Percentiles {
  double p10, median, p90;
};
inline Percentiles percentiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double q) {
    return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
  };
  return {at(0.1), at(0.5), at(0.9)};
}

/// Limits and kernel of one case, in seconds.
struct Measured {
  Percentiles kernel;
  double peak_flops;      // of all threads, median; 0 where there is no VDPBF16PS
  double stream_bytes_s;  // of all threads, median
};

class Machine {
 public:
  explicit Machine(const Options& options)
      : options_(options),
        pool_(options.threads),
        stream_bytes_(int64_t{256} << 20),
        stream_(huge_bytes(stream_bytes_)) {}
  Stream stream() { return Stream{options_.threads == 1 ? nullptr : &pool_}; }

  /// Calls `kernel` for a while, in turn with the arithmetic peak and a read stream.
  template <typename F>
  Measured measure(F&& kernel) {
    kernel();
    std::vector<double> kernel_s, peak, bandwidth;
    const double begin = now(options_);
    while (now(options_) - begin < options_.seconds || kernel_s.size() < 7) {
      double start = now(options_);
      kernel();
      kernel_s.push_back(now(options_) - start);
      if (kernel_s.size() % 4 != 1) continue;
      constexpr int64_t kRounds = 20000;
      if (has_dot()) {
        start = now(options_);
        parallel_chunks(stream(), options_.threads, 1,
                        [&](int64_t, int64_t, int) { sink_ = dot_rounds(kRounds); });
        peak.push_back(options_.threads * kRounds * 12 * 64 / (now(options_) - start));
      }
      const int64_t bytes = int64_t{16} << 20;
      start = now(options_);
      parallel_chunks(stream(), options_.threads, 1, [&](int64_t i, int64_t, int) {
        const int64_t at = (stream_at_ + i * bytes) % stream_bytes_;
        sink_ = static_cast<float>(read_stream(stream_ + at, stream_ + at + bytes));
      });
      bandwidth.push_back(static_cast<double>(options_.threads * bytes) / (now(options_) - start));
      stream_at_ += options_.threads * bytes;
    }
    return {percentiles(kernel_s), peak.empty() ? 0 : percentiles(peak).median,
            percentiles(bandwidth).median};
  }

 private:
  const Options& options_;
  ThreadPool pool_;
  int64_t stream_bytes_, stream_at_ = 0;
  std::byte* stream_;
  volatile float sink_ = 0;
};

inline void print(const std::string& name, std::string_view candidate, const Measured& m,
                  double flop, double bytes) {
  std::printf("%-34s %-10s %9.1f us [%.1f..%.1f]  %6.1f GFLOP/s", name.c_str(),
              std::string(candidate).c_str(), m.kernel.median * 1e6, m.kernel.p10 * 1e6,
              m.kernel.p90 * 1e6, flop / m.kernel.median * 1e-9);
  if (m.peak_flops > 0) {
    std::printf(" = %.0f%% of %.0f", 100 * flop / m.kernel.median / m.peak_flops,
                m.peak_flops * 1e-9);
  }
  std::printf("  %5.1f GB/s = %.0f%% of %.1f\n", bytes / m.kernel.median * 1e-9,
              100 * bytes / m.kernel.median / m.stream_bytes_s, m.stream_bytes_s * 1e-9);
  std::fflush(stdout);
}

/// Scratch of exactly the promised size.
inline Arena make_arena(int64_t bytes) {
  return Arena(huge_bytes(bytes), bytes);
}

}  // namespace dsv4::cpu::bench
