// Dense products of the CPU against their limits: a read stream of the same bytes for few rows of
// x, the arithmetic peak for many. Stream and kernel alternate, because a shared machine changes
// from minute to minute; medians, 10th and 90th percentiles.
//
//   linear_bench [--threads N] [--candidate NAME] [--filter TEXT] [--peak GFLOPS] [--clock
//   wall|cpu]
//
// --peak is the bf16 peak of one thread (VDPBF16PS: 64 operations a cycle); f32 has half of it.
// --clock cpu (with --threads 1) counts CPU time: for machines that others use.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/candidates.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "core/thread_pool.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kColdBytes = int64_t{384} << 20;  // beyond every cache of today
constexpr double kSeconds = 0.6;                    // of one case
constexpr int kMinRounds = 7;

// Wall clock; with one thread on a busy machine, the thread's own time says more.
clockid_t bench_clock = CLOCK_MONOTONIC;

double now() {
  timespec time;
  clock_gettime(bench_clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct Shape {
  const char* name;
  DType x, w;
  int64_t m, n, k;
  int problems;  // of one call, sharing x
};

// Shapes of DeepSeek-V4-Flash: wq_b, wo_b, wkv, experts, the compressor's gates, the head.
constexpr DType kFp8 = DType::kF8E4M3, kFp4 = DType::kF4E2M1, kBf16 = DType::kBf16,
                kF32 = DType::kF32;
constexpr Shape kShapes[] = {
    {"wq_b", kBf16, kFp8, 1, 32768, 1024, 1},
    {"wq_b", kBf16, kFp8, 2, 32768, 1024, 1},
    {"wq_b", kBf16, kFp8, 4, 32768, 1024, 1},
    {"wo_b", kBf16, kFp8, 1, 4096, 8192, 1},
    {"wo_b", kBf16, kFp8, 2, 4096, 8192, 1},
    {"wo_b", kBf16, kFp8, 4, 4096, 8192, 1},
    {"wkv", kBf16, kFp8, 1, 512, 4096, 1},
    {"wo_a groups", kBf16, kFp8, 1, 1024, 4096, 8},
    {"expert w1, w3", kBf16, kFp4, 1, 2048, 4096, 12},
    {"expert w2", kBf16, kFp4, 1, 4096, 2048, 6},
    {"expert w1, w3", kBf16, kFp4, 4, 2048, 4096, 12},
    {"expert w1, w3", kBf16, kFp4, 8, 2048, 4096, 12},
    {"expert w1, w3", kBf16, kFp4, 16, 2048, 4096, 12},
    {"expert w1, w3", kBf16, kFp4, 64, 2048, 4096, 2},
    {"expert w1, w3", kBf16, kFp4, 256, 2048, 4096, 2},
    {"expert w1, w3", kBf16, kFp4, 2048, 2048, 4096, 2},
    {"compressor", kBf16, kBf16, 1, 1024, 4096, 2},
    {"head", kF32, kBf16, 1, 32768, 4096, 1},
    {"hyper-connection", kF32, kF32, 1, 24, 16384, 1},
    {"wq_b", kBf16, kFp8, 8, 32768, 1024, 1},
    {"wq_b", kBf16, kFp8, 16, 32768, 1024, 1},
    {"wq_b", kBf16, kFp8, 64, 32768, 1024, 1},
    {"wo_b", kBf16, kFp8, 8, 4096, 8192, 1},
    {"wo_b", kBf16, kFp8, 16, 4096, 8192, 1},
    {"wo_b", kBf16, kFp8, 64, 4096, 8192, 1},
    {"square", kBf16, kFp8, 2048, 4096, 4096, 1},
    {"wq_b", kBf16, kFp8, 2048, 32768, 1024, 1},
    {"wo_b", kBf16, kFp8, 2048, 4096, 8192, 1},
    {"compressor", kBf16, kBf16, 2048, 1024, 4096, 2},
    {"wo_b exact", kF32, kFp8, 2048, 4096, 8192, 1},
    {"expert exact", kF32, kFp4, 256, 2048, 4096, 2},
    {"head", kF32, kBf16, 64, 32768, 4096, 1},
    {"hyper-connection", kF32, kF32, 2048, 24, 16384, 1},
};

// Memory in huge pages where the system gives them.
std::byte* huge_bytes(int64_t bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) fail(ErrorCode::kOutOfMemory, "linear_bench: ", bytes, " bytes");
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return static_cast<std::byte*>(data);
}

using Words = uint64_t __attribute__((vector_size(64), aligned(8), may_alias));

// Reads [begin, end) in vectors as wide as the compiler has: the yardstick must not be the
// bottleneck. Two accumulators keep the additions off the critical path.
uint64_t read_stream(const std::byte* begin, const std::byte* end) {
  Words a{}, b{};
  for (; begin + 128 <= end; begin += 128) {
    a ^= *reinterpret_cast<const Words*>(begin);
    b ^= *reinterpret_cast<const Words*>(begin + 64);
  }
  a ^= b;
  return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

struct Percentiles {
  double best, p10, median, p90;
};
Percentiles percentiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double q) { return values[static_cast<size_t>(q * (values.size() - 1))]; };
  return {at(0), at(0.1), at(0.5), at(0.9)};
}

class Bench {
 public:
  Bench(int threads, const std::string& candidate, double peak)
      : pool_(threads), threads_(threads), peak_(peak) {
    const Candidate* chosen = nullptr;
    for (const Candidate& c : linear_candidates()) {
      if (candidate.empty() ? c.why_not().empty() && chosen == nullptr : c.name == candidate)
        chosen = &c;
    }
    if (chosen == nullptr || !chosen->why_not().empty()) {
      fail(ErrorCode::kInvalidArgument, "linear_bench: no usable candidate \"", candidate, "\"",
           chosen == nullptr ? "" : ": ", chosen == nullptr ? "" : chosen->why_not());
    }
    chosen->install(ops_);
    std::printf("candidate %s, %d threads, peak %.0f GFLOP/s bf16 per thread\n",
                std::string(chosen->name).c_str(), threads, peak);
    weights_ = huge_bytes(kColdBytes);
    std::mt19937_64 random(1);
    for (int64_t i = 0; i < kColdBytes; i += 8) {
      // No NaN in any type, bf16 below 2; FP8 as trained weights are: hardly a zero or subnormal.
      const uint64_t word = (random() & 0x3fbf3fbf3fbf3fbfu) | 0x0808080808080808u;
      std::memcpy(weights_ + i, &word, 8);
    }
    scales_.assign(size_t{64} << 20 >> 2, 0);
    for (uint8_t& scale : scales_) scale = static_cast<uint8_t>(112 + random() % 8);
  }

  void run(const Shape& s) {
    const int64_t weight_bytes = s.n * s.k * (s.w == kFp4 ? 1 : 2 * size_of(s.w)) / 2;
    const int64_t call_bytes = weight_bytes * s.problems;
    const int64_t calls = std::max<int64_t>(1, kColdBytes / call_bytes);
    std::vector<uint8_t> x(static_cast<size_t>(s.m * s.k * size_of(s.x)));
    std::mt19937_64 random(2);
    for (int64_t i = 0; i < s.m * s.k; ++i) {
      const float value = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 500.0f;
      if (s.x == kF32) {
        reinterpret_cast<float*>(x.data())[i] = value;
      } else {
        reinterpret_cast<uint16_t*>(x.data())[i] = f32_to_bf16(value);
      }
    }
    std::vector<std::vector<uint16_t>> out(s.problems);
    for (auto& o : out) o.resize(static_cast<size_t>(s.m * s.n));
    ScratchLimits limits;
    limits.max_tokens = s.m;
    limits.max_cols = s.k;
    limits.num_threads = threads_;
    const int64_t scratch_bytes = linear_scratch_bytes(limits);
    std::byte* scratch = huge_bytes(scratch_bytes);

    std::vector<LinearProblem> problems(s.problems);
    const auto call = [&](int64_t idx) {
      for (int p = 0; p < s.problems; ++p) {
        Weight w{.dtype = s.w,
                 .data = weights_ + idx * call_bytes + p * weight_bytes,
                 .rows = s.n,
                 .cols = s.k,
                 .row_stride = s.k};
        if (s.w == kFp8) w.scale_stride = s.k / 128;
        if (s.w == kFp4) w.scale_stride = s.k / 32;
        // Scales of FP4 are 6% of the bytes; a call reads its own.
        const int64_t scale_bytes = s.w == kFp4 ? s.n * s.k / 32 : s.n / 128 * s.k / 128;
        const int64_t slots =
            static_cast<int64_t>(scales_.size()) / std::max<int64_t>(1, scale_bytes);
        w.scale = s.w == kFp8 || s.w == kFp4
                      ? scales_.data() + (idx * s.problems + p) % slots * scale_bytes
                      : nullptr;
        problems[p] = {ConstTensor(x.data(), s.x, {s.m, s.k}), w,
                       Tensor(out[p].data(), kBf16, {s.m, s.n})};
      }
      Arena arena(scratch, scratch_bytes);
      ops_.linear({.problems = problems, .quantise_input = s.x == kBf16 && s.w != kBf16},
                  {.stream = {&pool_}, .scratch = &arena, .ops = &ops_});
    };
    call(0);  // warm: tables, page faults
    const bool streaming = s.m <= 8;
    std::vector<double> kernel_us, stream_us;
    const double start = now();
    for (int64_t idx = 0;
         now() - start < kSeconds || static_cast<int>(kernel_us.size()) < kMinRounds;) {
      const double t0 = now();
      // A round streams at least 64 MiB, so that the clock and the pool do not matter.
      const int64_t round = std::clamp<int64_t>((int64_t{64} << 20) / call_bytes, 1, calls);
      if (streaming) {
        if (idx + round > calls) idx = 0;
        // Other bytes than the kernel is about to read: what remains in the cache helps neither.
        const int64_t other = idx + round <= calls / 2 ? calls - round : 0;
        stream(weights_ + other * call_bytes, round * call_bytes);
      }
      const double t1 = now();
      if (streaming) {
        for (int64_t i = 0; i < round; ++i) call(idx++);
        kernel_us.push_back((now() - t1) / static_cast<double>(round) * 1e6);
      } else {
        if (idx == calls) idx = 0;
        call(idx++);
        kernel_us.push_back((now() - t1) * 1e6);
      }
      stream_us.push_back((t1 - t0) / static_cast<double>(round) * 1e6);
    }
    std::vector<double> shares;
    for (size_t i = 0; i < kernel_us.size(); ++i) shares.push_back(stream_us[i] / kernel_us[i]);
    report(s, call_bytes, percentiles(kernel_us), percentiles(stream_us), percentiles(shares),
           streaming);
    munmap(scratch, static_cast<size_t>(scratch_bytes));
  }

 private:
  void stream(const std::byte* data, int64_t bytes) {
    const int64_t part = bytes / threads_ / 4096 * 4096;
    std::vector<uint64_t> sums(threads_);
    pool_.run(threads_,
              [&](int64_t t) { sums[t] = read_stream(data + t * part, data + (t + 1) * part); });
    volatile uint64_t sink = sums[0];
    (void)sink;
  }

  // "best" compares the least disturbed rounds of each: what an idle machine would show.
  void report(const Shape& s, int64_t bytes, const Percentiles& us, const Percentiles& stream,
              const Percentiles& share, bool streaming) {
    const double flops = 2.0 * static_cast<double>(s.m * s.n * s.k) * s.problems;
    const double peak = peak_ * threads_ * (s.x == kF32 || s.w == kF32 ? 0.5 : 1.0);
    std::printf("%-16s %4s x %.7s M=%4d %5dx%5d x%2d %8.0f us [%.0f %.0f..%.0f]", s.name,
                dtype_name(s.x), dtype_name(s.w), static_cast<int>(s.m), static_cast<int>(s.n),
                static_cast<int>(s.k), s.problems, us.median, us.best, us.p10, us.p90);
    if (streaming) {
      const double gigabytes = static_cast<double>(bytes) * 1e-3;
      std::printf(" %5.1f GB/s, stream %.1f, share %.2f [%.2f..%.2f], best %.1f / %.1f = %.2f",
                  gigabytes / us.median, gigabytes / stream.median, share.median, share.p10,
                  share.p90, gigabytes / us.best, gigabytes / stream.best, stream.best / us.best);
    }
    std::printf(", %4.0f GFLOP/s = %2.0f%%, best %.0f = %2.0f%%\n", flops / us.median * 1e-3,
                flops / us.median * 1e-1 / peak, flops / us.best * 1e-3,
                flops / us.best * 1e-1 / peak);
    std::fflush(stdout);
  }

  ThreadPool pool_;
  int threads_;
  double peak_;
  Ops ops_;
  std::byte* weights_;
  std::vector<uint8_t> scales_;
};

int bench_main(int argc, char** argv) {
  int threads = 2;
  double peak = 236;
  std::string candidate, filter;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--threads") threads = std::stoi(value);
    if (option == "--candidate") candidate = value;
    if (option == "--filter") filter = value;
    if (option == "--peak") peak = std::stod(value);
    if (option == "--clock" && value == "cpu") bench_clock = CLOCK_THREAD_CPUTIME_ID;
  }
  Bench bench(threads, candidate, peak);
  for (const Shape& shape : kShapes) {
    const std::string key =
        concat(shape.name, " ", dtype_name(shape.x), " ", dtype_name(shape.w), " M=", shape.m, ".");
    if (key.find(filter) != std::string::npos) bench.run(shape);
  }
  return 0;
}

}  // namespace
}  // namespace dsv4::cpu

int main(int argc, char** argv) {
  try {
    return dsv4::cpu::bench_main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
