// Dense products of the CPU against their limits: a read stream of the same bytes for few rows of
// x, the arithmetic peak for many. Stream and kernel alternate, because a shared machine changes
// from minute to minute; medians, 10th and 90th percentiles.
//
//   linear_bench [--threads N] [--candidate NAME] [--filter TEXT] [--seconds S] [--clock wall|cpu]
#include "bench/cpu_bench.h"

#include <random>

#include "core/numbers.h"

namespace dsv4::cpu::bench {
namespace {

constexpr int64_t kColdBytes = int64_t{384} << 20;  // of weights: beyond every cache of today
constexpr int kMinRounds = 7;

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
    {"square", kBf16, kFp8, 8, 4096, 4096, 1},
    {"square", kBf16, kFp8, 16, 4096, 4096, 1},
    {"square", kBf16, kFp8, 2048, 4096, 4096, 1},
    {"wq_b", kBf16, kFp8, 2048, 32768, 1024, 1},
    {"wo_b", kBf16, kFp8, 2048, 4096, 8192, 1},
    {"compressor", kBf16, kBf16, 2048, 1024, 4096, 2},
    {"wo_b exact", kF32, kFp8, 2048, 4096, 8192, 1},
    {"expert exact", kF32, kFp4, 256, 2048, 4096, 2},
    {"head", kF32, kBf16, 64, 32768, 4096, 1},
    {"hyper-connection", kF32, kF32, 2048, 24, 16384, 1},
};

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options), machine_(options) {
    const Candidate* chosen = nullptr;
    for (const Candidate& c : linear_candidates()) {
      if (options.candidate.empty() ? c.why_not().empty() && chosen == nullptr
                                    : c.name == options.candidate)
        chosen = &c;
    }
    if (chosen == nullptr || !chosen->why_not().empty()) {
      fail(ErrorCode::kInvalidArgument, "linear_bench: no usable candidate \"", options.candidate,
           "\"", chosen == nullptr ? "" : ": ", chosen == nullptr ? "" : chosen->why_not());
    }
    chosen->install(ops_);
    std::printf("candidate %s, %d threads\n", std::string(chosen->name).c_str(), options.threads);
    weights_ = zeroed_bytes(kColdBytes);
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
    limits.num_threads = options_.threads;
    const int64_t scratch_bytes = linear_scratch_bytes(limits);
    std::byte* scratch = zeroed_bytes(scratch_bytes);

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
                  {.stream = machine_.stream(), .scratch = &arena, .ops = &ops_});
    };
    call(0);  // warm: tables, page faults
    const bool streaming = s.m <= 8;
    const bool f32 = s.x == kF32 || s.w == kF32;
    std::vector<double> kernel_s, stream_bytes_s, peak;
    const double start = now(options_);
    for (int64_t idx = 0; now(options_) - start < options_.seconds ||
                          static_cast<int>(kernel_s.size()) < kMinRounds;) {
      // A round streams at least 64 MiB, so that the clock and the pool do not matter.
      const int64_t round = std::clamp<int64_t>((int64_t{64} << 20) / call_bytes, 1, calls);
      if (streaming) stream_bytes_s.push_back(machine_.stream_bytes_s());
      peak.push_back(machine_.peak_flops(f32));
      if (idx + round > calls) idx = 0;
      const double begin = now(options_);
      for (int64_t i = 0; i < round; ++i) call(idx++);
      kernel_s.push_back((now(options_) - begin) / static_cast<double>(round));
    }
    std::vector<double> shares;
    for (size_t i = 0; i < stream_bytes_s.size(); ++i)
      shares.push_back(static_cast<double>(call_bytes) / kernel_s[i] / stream_bytes_s[i]);
    report(s, call_bytes, kernel_s, stream_bytes_s, shares, peak);
    std::free(scratch);
  }

 private:
  void report(const Shape& s, int64_t bytes, const std::vector<double>& kernel_s,
              const std::vector<double>& stream_bytes_s, const std::vector<double>& shares,
              const std::vector<double>& peak) {
    const double flops = 2.0 * static_cast<double>(s.m * s.n * s.k) * s.problems;
    const Percentiles time = percentiles(kernel_s), limit = percentiles(peak);
    std::printf("%-16s %4s x %.7s M=%4d %5dx%5d x%2d %8.0f us [%.0f %.0f..%.0f]", s.name,
                dtype_name(s.x), dtype_name(s.w), static_cast<int>(s.m), static_cast<int>(s.n),
                static_cast<int>(s.k), s.problems, 1e6 * time.median, 1e6 * time.best,
                1e6 * time.p10, 1e6 * time.p90);
    if (!shares.empty()) {
      const Percentiles share = percentiles(shares), stream = percentiles(stream_bytes_s);
      std::printf(" %5.1f GB/s, stream %.1f, share %.2f [%.2f..%.2f]",
                  static_cast<double>(bytes) * 1e-9 / time.median, stream.median * 1e-9,
                  share.median, share.p10, share.p90);
    }
    std::printf(" %4.0f GFLOP/s", flops / time.median * 1e-9);
    if (limit.median > 0)
      std::printf(" = %2.0f%% of %.0f", 100 * flops / time.median / limit.median,
                  limit.median * 1e-9);
    std::printf("\n");
    std::fflush(stdout);
  }

  const Options& options_;
  Machine machine_;
  Ops ops_;
  std::byte* weights_;
  std::vector<uint8_t> scales_;
};

int bench_main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  Bench bench(options);
  for (const Shape& shape : kShapes) {
    const std::string key =
        concat(shape.name, " ", dtype_name(shape.x), " ", dtype_name(shape.w), " M=", shape.m, ".");
    if (key.find(options.filter) != std::string::npos) bench.run(shape);
  }
  return 0;
}

}  // namespace
}  // namespace dsv4::cpu::bench

int main(int argc, char** argv) {
  try {
    return dsv4::cpu::bench::bench_main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
