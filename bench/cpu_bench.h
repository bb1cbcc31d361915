// What the benches of CPU kernels share: options, clock, memory, limits of the machine measured in
// the same run, and a loop that alternates a kernel with them.
#pragma once
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
#include "backends/cpu/limits.h"
#include "backends/cpu/parallel.h"
#include "core/arena.h"
#include "core/fail.h"
#include "core/host_memory.h"
#include "core/thread_pool.h"

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
                   argv[0], flag.data());
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

/// Zeroed memory, as a device allocates it; free it with std::free, or never.
inline std::byte* zeroed_bytes(int64_t bytes) {
  DSV4_CHECK(bytes >= 0);
  void* data = allocate_host_memory(bytes);
  if (data == nullptr) fail(ErrorCode::kOutOfMemory, "bench: ", bytes, " bytes");
  std::memset(data, 0, static_cast<size_t>(bytes));
  return static_cast<std::byte*>(data);
}

struct Percentiles {
  double best, p10, median, p90;
};
inline Percentiles percentiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double q) {
    return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
  };
  return {at(0), at(0.1), at(0.5), at(0.9)};
}

/// Limits and kernel of one case, in seconds.
struct Measured {
  Percentiles kernel;
  double peak_flops;      // of all threads, median: VDPBF16PS, or f32 FMA where there is none
  double stream_bytes_s;  // of all threads, median
};

class Machine {
 public:
  explicit Machine(const Options& options)
      : options_(options), pool_(options.threads), stream_(zeroed_bytes(kStreamBytes)) {}
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
      peak.push_back(peak_flops(loops_.bf16 == nullptr));
      bandwidth.push_back(stream_bytes_s());
    }
    return {percentiles(kernel_s), percentiles(peak).median, percentiles(bandwidth).median};
  }

  /// One short measurement each, of all threads.
  double peak_flops(bool f32) {
    constexpr int64_t kIterations = 20000;
    const auto loop = f32 ? loops_.f32 : loops_.bf16;
    if (loop == nullptr) return 0;
    const double start = now(options_);
    parallel_chunks(stream(), options_.threads, 1,
                    [&](int64_t, int64_t, int) { sink_ = loop(kIterations); });
    return options_.threads * kIterations * (f32 ? loops_.f32_flops : loops_.bf16_flops) /
           (now(options_) - start);
  }
  double stream_bytes_s() {
    constexpr int64_t kBytes = int64_t{16} << 20;
    const double start = now(options_);
    parallel_chunks(stream(), options_.threads, 1, [&](int64_t i, int64_t, int) {
      const int64_t at = (stream_at_ + i * kBytes) % kStreamBytes;
      sink_ = static_cast<float>(loops_.read(stream_ + at, kBytes));
    });
    stream_at_ += options_.threads * kBytes;
    return static_cast<double>(options_.threads * kBytes) / (now(options_) - start);
  }

 private:
  const Options& options_;
  ThreadPool pool_;
  static constexpr int64_t kStreamBytes = int64_t{1} << 30;  // far beyond every cache
  const LimitLoops loops_ = limit_loops();
  int64_t stream_at_ = 0;
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
  return Arena(zeroed_bytes(bytes), bytes);
}

}  // namespace dsv4::cpu::bench
