// Indexer scores, top-k and the model around attention on an NVIDIA GPU, beside the public kernels'
// times on an H200.
//
//   cuda_index_bench [--op top_k|logits|prefill|rows] [--candidate NAME] [--case TEXT] [--quick]
//
// --case takes the cases whose first column holds TEXT.
//
// Time: a CUDA graph of launches over rotating inputs (together at least 256 MB, so that they are
// cold), replayed; median over replays / launches. "hot" repeats one input set, "slots" is cold
// with map_slots, in one launch or two. "x" is the time
// over max(bytes / 4274 GB/s, FLOP / 1500 TFLOP/s). Anchors: torch.topk and DeepGEMM 54e2261, same
// method.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/candidates.h"
#include "backends/nvidia/cuda_device.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "cache/kv_format.h"
#include "core/numbers.h"
#include "dsv4/backend.h"
#include "ops/ops.h"

namespace dsv4::nvidia {
namespace {

constexpr double kBytesPerUs = 4274e3, kFp8FlopsPerUs = 1500e6;
constexpr int64_t kColdBytes = 256 << 20;

struct Options {
  std::string op, candidate, which;
  bool quick = false;
};

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options), device_(open_cuda_device(0)) {
    capability_ = find_devices(Platform::kCuda).devices.at(0).capability;
    DSV4_CUDA_CHECK(cudaStreamCreate(&stream_));
    std::printf("%s\n", device_->description().c_str());
  }
  ~Bench() { cudaStreamDestroy(stream_); }

  const Options& options() const { return options_; }
  Device& device() { return *device_; }
  Buffer memory(int64_t bytes) { return device_->allocate(bytes); }
  template <typename T>
  Buffer upload(const std::vector<T>& values) {
    Buffer buffer = memory(static_cast<int64_t>(values.size() * sizeof(T)));
    DSV4_CUDA_CHECK(cudaMemcpy(buffer.data(), values.data(), values.size() * sizeof(T),
                               cudaMemcpyHostToDevice));
    return buffer;
  }
  /// Random bytes that `make` draws, repeated over the buffer.
  Buffer pattern(int64_t bytes, int64_t period, const std::function<void(std::byte*)>& make) {
    std::vector<std::byte> piece(static_cast<size_t>(std::min(bytes, period)));
    make(piece.data());
    Buffer buffer = memory(bytes);
    for (int64_t at = 0; at < bytes; at += period) {
      const auto size = static_cast<size_t>(std::min(period, bytes - at));
      DSV4_CUDA_CHECK(cudaMemcpy(buffer.data() + at, piece.data(), size, cudaMemcpyHostToDevice));
    }
    return buffer;
  }

  /// Candidates of a family that run here (or the one that was asked for).
  std::vector<std::string> usable(std::string_view family) const {
    std::vector<std::string> names;
    for (const Candidate& candidate : candidates()) {
      if (candidate.family != family || !candidate.why_not(capability_).empty()) continue;
      if (options_.candidate.empty() ? candidate.name != "reference"
                                     : candidate.name == options_.candidate) {
        names.emplace_back(candidate.name);
      }
    }
    return names;
  }
  Ops ops(std::string_view family, const std::string& name) const {
    return make_ops(capability_, concat(family, ":", name));
  }

  /// Microseconds of one `launch(set)`, sets rotating.
  double time(int sets, const std::function<void(int set, const OpContext&)>& launch,
              int64_t scratch_bytes = 0) {
    Buffer scratch = memory(std::max<int64_t>(scratch_bytes, 1));
    const auto call = [&](int i) {
      Arena arena(scratch.data(), scratch_bytes);
      launch(i % sets, {{stream_}, &arena, nullptr});
    };
    cudaEvent_t begin, end;
    DSV4_CUDA_CHECK(cudaEventCreate(&begin));
    DSV4_CUDA_CHECK(cudaEventCreate(&end));
    const auto elapsed_us = [&](const std::function<void()>& work) {
      DSV4_CUDA_CHECK(cudaEventRecord(begin, stream_));
      work();
      DSV4_CUDA_CHECK(cudaEventRecord(end, stream_));
      DSV4_CUDA_CHECK(cudaEventSynchronize(end));
      float ms = 0;
      DSV4_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
      return 1e3 * ms;
    };
    call(0);
    const double guess = std::max(2.0, elapsed_us([&] { call(0); }));
    const int launches = std::max(sets, static_cast<int>(2500 / guess) + 1);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    DSV4_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) call(i);
    DSV4_CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
    DSV4_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<double> times;
    for (int i = 0; i < (options_.quick ? 4 : 12); ++i) {
      const double us =
          elapsed_us([&] { DSV4_CUDA_CHECK(cudaGraphLaunch(exec, stream_)); }) / launches;
      if (i > 0) times.push_back(us);
    }
    DSV4_CUDA_CHECK(cudaGraphExecDestroy(exec));
    DSV4_CUDA_CHECK(cudaGraphDestroy(graph));
    DSV4_CUDA_CHECK(cudaEventDestroy(begin));
    DSV4_CUDA_CHECK(cudaEventDestroy(end));
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }

 private:
  Options options_;
  std::unique_ptr<Device> device_;
  Capability capability_;
  cudaStream_t stream_ = nullptr;
};

int sets_for(int64_t bytes) {
  return static_cast<int>(std::clamp<int64_t>((kColdBytes + bytes - 1) / bytes, 1, 512));
}

// ---- top_k

struct TopKCase {
  int64_t rows, n;
  int k;
  double torch_us;  // graph, unsorted; eager where there was no graph. Of normal scores
};
constexpr TopKCase kTopKCases[] = {
    {1, 2048, 512, 0},        {64, 2048, 512, 0},     {128, 2048, 512, 0},
    {1, 16384, 512, 72.7},    {64, 16384, 512, 66.7}, {1024, 16384, 512, 268},
    {1, 32768, 512, 0},       {16, 32768, 512, 0},    {64, 32768, 512, 0},
    {128, 32768, 512, 0},     {1, 65536, 512, 46.2},  {16, 65536, 512, 0},
    {64, 65536, 512, 102},    {1, 262144, 512, 0},    {64, 262144, 512, 273},
    {128, 262144, 512, 450},  {1, 16384, 1024, 70.6}, {64, 16384, 1024, 67.3},
    {1024, 16384, 1024, 266}, {1, 65536, 1024, 45.9}, {64, 65536, 1024, 102},
    {128, 262144, 1024, 452}, {1, 1000000, 1024, 0},
};
// Of the other kinds of scores.
constexpr TopKCase kTopKKindCases[] = {
    {1, 2048, 512, 0},    {64, 2048, 512, 0},  {1, 32768, 512, 0},  {64, 32768, 512, 0},
    {128, 32768, 512, 0}, {64, 65536, 512, 0}, {1, 262144, 512, 0},
};

// Scores of a row, as they may come: of random rows, and of what is hard for a histogram or a
// sample.
struct ScoreKind {
  const char* name;
  float (*score)(int64_t at, int64_t n, std::mt19937& random);
};
float normal_score(std::mt19937& random) {
  return std::normal_distribution<float>()(random);
}
float uniform_score(std::mt19937& random) {
  return std::uniform_real_distribution<float>()(random);
}
constexpr ScoreKind kScoreKinds[] = {
    {"normal", [](int64_t, int64_t, std::mt19937& r) { return normal_score(r); }},
    {"uniform", [](int64_t, int64_t, std::mt19937& r) { return uniform_score(r); }},
    {"exponential",
     [](int64_t, int64_t, std::mt19937& r) { return std::exp(6 * normal_score(r)); }},
    {"narrow", [](int64_t, int64_t, std::mt19937& r) { return 1000 + 1e-3f * normal_score(r); }},
    {"zeros", [](int64_t, int64_t,
                 std::mt19937& r) { return uniform_score(r) < 0.995f ? 0.0f : normal_score(r); }},
    {"integers", [](int64_t, int64_t, std::mt19937& r) { return std::floor(3 * normal_score(r)); }},
    {"equal", [](int64_t, int64_t, std::mt19937&) { return 1.0f; }},
    {"period",
     [](int64_t at, int64_t, std::mt19937&) {  // 64 scores again and again
       return std::sin(static_cast<float>(at % 64));
     }},
    {"rising",
     [](int64_t at, int64_t n, std::mt19937& r) {
       return static_cast<float>(at % n) / static_cast<float>(n) + 1e-4f * normal_score(r);
     }},
    {"local",
     [](int64_t at, int64_t n, std::mt19937& r) {  // the best ones are neighbours
       return normal_score(r) + (at % n >= n / 3 && at % n < n / 3 + 1000 ? 9.0f : 0.0f);
     }},
};

void bench_top_k(Bench& bench) {
  std::printf("\ntop_k: us\n%-34s %-10s %8s %8s %8s %8s %8s %6s\n", "rows x n, k, data", "kernel",
              "cold", "hot", "slots", "torch", "floor", "x");
  for (const ScoreKind& kind : kScoreKinds) {
    const bool is_first = &kind == kScoreKinds;
    for (const TopKCase& which :
         is_first ? std::span<const TopKCase>(kTopKCases) : kTopKKindCases) {
      const std::string name_of_case =
          concat(which.rows, " x ", which.n, ", ", which.k, ", ", kind.name);
      if (name_of_case.find(bench.options().which) == std::string::npos) continue;
      const int64_t row_bytes = which.n * 4, bytes = which.rows * row_bytes;
      const int sets = sets_for(bytes);
      std::mt19937 random(7);
      const int64_t rows = std::max<int64_t>(1, (1 << 20) / which.n);
      const Buffer logits = bench.pattern(bytes * sets, rows * row_bytes, [&](std::byte* to) {
        auto* scores = reinterpret_cast<float*>(to);
        for (int64_t i = 0; i < std::min(rows * which.n, bytes * sets / 4); ++i)
          scores[i] = kind.score(i, which.n, random);
      });
      const Buffer end =
          bench.upload(std::vector<int32_t>(static_cast<size_t>(which.rows), int32_t(which.n)));
      const Buffer indices = bench.memory(which.rows * which.k * 4),
                   slots = bench.memory(which.rows * which.k * 4),
                   length = bench.memory(which.rows * 4);
      // Every row has a sequence of its own.
      constexpr int32_t kBlockRows = 64;
      const int64_t columns = (which.n + kBlockRows - 1) / kBlockRows;
      std::vector<int32_t> table(static_cast<size_t>(which.rows * columns)), seqs;
      for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
      for (int64_t i = 0; i < which.rows; ++i) seqs.push_back(static_cast<int32_t>(i));
      const Buffer blocks = bench.upload(table), sequences = bench.upload(seqs);
      for (const std::string& name : bench.usable("top_k")) {
        const Ops ops = bench.ops("top_k", name);
        const auto launch_with = [&](bool with_slots) {
          return [&, with_slots](int set, const OpContext& context) {
            const TopKSlots to{.token_to_seq = reinterpret_cast<const int32_t*>(sequences.data()),
                               .blocks = {reinterpret_cast<const int32_t*>(blocks.data()), columns,
                                          static_cast<int32_t>(columns), 4 * kBlockRows},
                               .rows_per_block = kBlockRows,
                               .slots = Tensor(slots.data(), DType::kI32, {which.rows, which.k})};
            const Tensor out(indices.data(), DType::kI32, {which.rows, which.k});
            ops.top_k({.logits = ConstTensor(logits.data() + set * bytes, DType::kF32,
                                             {which.rows, which.n}),
                       .end = reinterpret_cast<const int32_t*>(end.data()),
                       .topk_indices = out,
                       .topk_length = reinterpret_cast<int32_t*>(length.data()),
                       .slots = with_slots && ops.top_k_maps_slots ? to : TopKSlots{}},
                      context);
            if (!with_slots || ops.top_k_maps_slots) return;
            ops.map_slots({.topk_indices = out,
                           .token_to_seq = to.token_to_seq,
                           .blocks = to.blocks,
                           .rows_per_block = to.rows_per_block,
                           .slots = to.slots},
                          context);
          };
        };
        const double cold = bench.time(sets, launch_with(false)),
                     hot = bench.time(1, launch_with(false)),
                     with_slots = bench.time(sets, launch_with(true));
        const double floor_us = static_cast<double>(bytes) / kBytesPerUs;
        std::printf("%-34s %-10s %8.1f %8.1f %8.1f %8.1f %8.1f %6.1f\n", name_of_case.c_str(),
                    name.c_str(), cold, hot, with_slots, which.torch_us, floor_us,
                    cold / std::max(floor_us, 2.8));
      }
    }
  }
}

// ---- index_logits

struct LogitsCase {
  int64_t batch, tokens, entries;  // tokens of each sequence
  double deep_gemm_us;
  KvFormat format = KvFormat::kIndexFp8;
};
constexpr LogitsCase kDecodeCases[] = {
    {1, 1, 2048, 3.6},
    {1, 1, 16384, 4.0},
    {1, 1, 65536, 5.8},
    {1, 1, 262144, 12.8},
    {16, 1, 2048, 4.4},
    {16, 1, 16384, 12.8},
    {16, 1, 65536, 39.6},
    {16, 1, 262144, 143},
    {64, 1, 2048, 8.2},
    {64, 1, 16384, 39.6},
    {64, 1, 65536, 143},
    {64, 1, 262144, 553},
    {128, 1, 2048, 13.0},
    {128, 1, 16384, 75.0},
    {128, 1, 65536, 279},
    {1, 2, 2048, 4.1},
    {1, 2, 65536, 6.4},
    {1, 2, 262144, 14.1},
    {16, 2, 2048, 4.9},
    {16, 2, 65536, 42.0},
    {64, 2, 16384, 42.1},
    {64, 2, 65536, 149},
    {128, 2, 16384, 79.2},
    {1, 1, 262144, 0, KvFormat::kIndexMxfp4},
    {64, 1, 65536, 0, KvFormat::kIndexMxfp4},
};
constexpr LogitsCase kPrefillCases[] = {
    {1, 1024, 2048, 35.0},  {1, 1024, 16384, 247},
    {1, 1024, 32768, 503},  {1, 1024, 131072, 2087},
    {1, 4096, 2048, 139},   {1, 4096, 16384, 1004},
    {1, 4096, 32768, 2102}, {1, 4096, 16384, 0, KvFormat::kIndexMxfp4},
};

void bench_logits(Bench& bench, std::span<const LogitsCase> cases, const char* title) {
  constexpr int64_t kHeads = 64, kDim = 128, kRows = 64;
  std::printf("\n%s: us\n%-40s %-10s %8s %10s %8s %8s %6s %6s\n", title,
              "batch x tokens x entries, format", "kernel", "cold", "DeepGEMM", "GB/s", "TFLOP/s",
              "x", "ours/DG");
  for (const LogitsCase& which : cases) {
    const std::string name_of_case = concat(which.batch, " x ", which.tokens, " x ", which.entries,
                                            ", ", kv_format_name(which.format));
    if (name_of_case.find(bench.options().which) == std::string::npos) continue;
    const RowLayout layout = row_layout(which.format, kDim);
    const int64_t stride = (kRows * layout.row_bytes() + 575) / 576 * 576;
    const int64_t pages = (which.entries + kRows - 1) / kRows, tokens = which.batch * which.tokens;
    const int64_t cache_bytes = which.batch * pages * stride;
    const int64_t q_bytes = tokens * kHeads * kDim * 2, out_bytes = tokens * which.entries * 4;
    const int sets = std::min(sets_for(cache_bytes), 64);
    std::mt19937 random(11);
    const Buffer caches = bench.pattern(cache_bytes * sets, 128 * stride, [&](std::byte* to) {
      for (int64_t page = 0; page < std::min<int64_t>(128, which.batch * pages * sets); ++page) {
        std::byte* at = to + page * stride;
        for (int64_t i = 0; i < kRows * layout.value_bytes; ++i) {
          at[i] = static_cast<std::byte>(random() & 0xf7);  // no NaN among FP8 codes
        }
        for (int64_t i = 0; i < kRows; ++i) {
          const float scale = 0.5f;
          std::byte* scales = at + kRows * layout.value_bytes + 4 * i;
          if (which.format == KvFormat::kIndexFp8) {
            std::memcpy(scales, &scale, 4);
          } else {
            std::memset(scales, 126, 4);
          }
        }
      }
    });
    const Buffer q = bench.pattern(q_bytes, q_bytes, [&](std::byte* to) {
      auto* values = reinterpret_cast<uint16_t*>(to);
      for (int64_t i = 0; i < q_bytes / 2; ++i) {
        values[i] = f32_to_bf16(static_cast<float>(static_cast<int>(random() % 15) - 7));
      }
    });
    const Buffer codes = bench.pattern(q_bytes / 2, q_bytes / 2, [&](std::byte* to) {
      for (int64_t i = 0; i < q_bytes / 2; ++i) {
        to[i] = static_cast<std::byte>(
            f32_to_e4m3(static_cast<float>(static_cast<int>(random() % 15) - 7)));
      }
    });
    const Buffer weights = bench.upload(std::vector<float>(size_t(tokens * kHeads), 0.01f));
    std::vector<int32_t> table(static_cast<size_t>(which.batch * pages)), token_to_seq;
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    std::shuffle(table.begin(), table.end(), random);
    for (int64_t t = 0; t < tokens; ++t) token_to_seq.push_back(int32_t(t / which.tokens));
    const Buffer tables = bench.upload(table), sequences = bench.upload(token_to_seq);
    const Buffer end =
        bench.upload(std::vector<int32_t>(size_t(tokens), static_cast<int32_t>(which.entries)));
    const Buffer logits = bench.memory(out_bytes);
    for (const std::string& name : bench.usable("index_logits")) {
      const Ops ops = bench.ops("index_logits", name);
      const bool handed = ops.index_takes_e4m3 && which.format == KvFormat::kIndexFp8;
      const ConstTensor queries(handed ? codes.data() : q.data(),
                                handed ? DType::kF8E4M3 : DType::kBf16, {tokens, kHeads, kDim});
      const auto launch = [&](int set, const OpContext& context) {
        ops.index_logits({.q = queries,
                          .weights = ConstTensor(weights.data(), DType::kF32, {tokens, kHeads}),
                          .token_to_seq = reinterpret_cast<const int32_t*>(sequences.data()),
                          .end = reinterpret_cast<const int32_t*>(end.data()),
                          .max_end = static_cast<int32_t>(which.entries),
                          .blocks = {reinterpret_cast<const int32_t*>(tables.data()), pages,
                                     static_cast<int32_t>(pages), static_cast<int32_t>(4 * kRows)},
                          .cache = {.base = caches.data() + set * cache_bytes,
                                    .block_stride_bytes = stride,
                                    .num_blocks = static_cast<int32_t>(which.batch * pages),
                                    .rows_per_block = kRows,
                                    .format = which.format,
                                    .row_elems = kDim},
                          .logits = Tensor(logits.data(), DType::kF32, {tokens, which.entries})},
                         context);
      };
      ScratchLimits limits{.max_tokens = tokens,
                           .index_heads = kHeads,
                           .index_dim = kDim,
                           .max_entries = which.entries};
      const double us = bench.time(sets, launch, ops.scratch_bytes(limits));
      const double bytes = static_cast<double>(which.batch * which.entries * layout.row_bytes() +
                                               (handed ? q_bytes / 2 : q_bytes) + out_bytes);
      const double flops = 2.0 * kHeads * kDim * static_cast<double>(tokens * which.entries);
      const double floor_us = std::max({bytes / kBytesPerUs, flops / kFp8FlopsPerUs, 2.8});
      std::printf("%-40s %-10s %8.1f %10.1f %8.0f %8.0f %6.2f %6.2f\n", name_of_case.c_str(),
                  name.c_str(), us, which.deep_gemm_us, bytes / us / 1e3, flops / us / 1e6,
                  us / floor_us, which.deep_gemm_us > 0 ? us / which.deep_gemm_us : 0.0);
    }
  }
}

// ---- the model around attention, V4-Flash: 4 streams of 4096, 256 experts, 6 for a token

void bench_rows(Bench& bench) {
  constexpr int64_t kHc = 4, kWidth = 4096, kRows = (2 + kHc) * kHc, kExperts = 256, kVocab = 4096;
  constexpr int kTopK = 6;
  std::printf("\nmodel rows: us\n%-24s %-10s %8s %8s %6s\n", "operation, tokens", "kernel", "hot",
              "floor", "x");
  std::mt19937 random(13);
  std::normal_distribution<float> normal;
  const auto floats = [&](int64_t count, float scale) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = scale * normal(random);
    return bench.upload(values);
  };
  const Buffer fn = floats(kRows * kHc * kWidth, 0.01f), base = floats(kRows, 1),
               scale = floats(3, 1);
  const Buffer table = bench.memory(kVocab * kWidth * 2);
  DSV4_CUDA_CHECK(cudaMemset(table.data(), 0, kVocab * kWidth * 2));
  const HcWeights site{ConstTensor(fn.data(), DType::kF32, {kRows, kHc * kWidth}),
                       ConstTensor(base.data(), DType::kF32, {kRows}),
                       ConstTensor(scale.data(), DType::kF32, {3})};
  const Buffer bias = floats(kExperts, 0.1f);
  for (int64_t tokens : {1, 16, 64, 128, 2048}) {
    const Buffer x = bench.pattern(tokens * kHc * kWidth * 2, 1 << 20, [&](std::byte* to) {
      auto* values = reinterpret_cast<uint16_t*>(to);
      for (int64_t i = 0; i < std::min<int64_t>(1 << 19, tokens * kHc * kWidth); ++i) {
        values[i] = f32_to_bf16(normal(random));
      }
    });
    const Buffer y = bench.memory(tokens * kWidth * 2), post = bench.memory(tokens * kHc * 4),
                 comb = bench.memory(tokens * kHc * kHc * 4);
    const Buffer logits = floats(tokens * kExperts, 3), ids = bench.memory(tokens * kTopK * 4),
                 weights = bench.memory(tokens * kTopK * 4);
    const Buffer token_ids = bench.upload(std::vector<int32_t>(size_t(tokens), 7));
    const Tensor streams(x.data(), DType::kBf16, {tokens, kHc, kWidth});
    const Tensor input(y.data(), DType::kBf16, {tokens, kWidth});
    const Tensor posts(post.data(), DType::kF32, {tokens, kHc});
    const Tensor combs(comb.data(), DType::kF32, {tokens, kHc, kHc});
    for (const std::string& name : bench.usable("model_rows")) {
      const Ops ops = bench.ops("model_rows", name);
      ScratchLimits limits{.max_tokens = tokens, .hidden_size = kWidth, .num_experts = kExperts};
      const auto report = [&](const char* op, double bytes,
                              const std::function<void(int, const OpContext&)>& launch) {
        const double us = bench.time(1, launch, ops.scratch_bytes(limits));
        const double floor_us = bytes / kBytesPerUs;
        std::printf("%-24s %-10s %8.1f %8.1f %6.1f\n", concat(op, ", ", tokens).c_str(),
                    name.c_str(), us, floor_us, us / std::max(floor_us, 2.8));
      };
      const auto row = static_cast<double>(tokens * kWidth * 2);
      report("hc_pre", row * (kHc + 1) + kRows * kHc * kWidth * 4.0, [&](int, const OpContext& c) {
        ops.hc_pre({.streams = streams,
                    .weights = site,
                    .norm_eps = 1e-6f,
                    .hc_eps = 1e-6f,
                    .sinkhorn_iters = 20,
                    .y = input,
                    .post = posts,
                    .comb = combs},
                   c);
      });
      report("hc_post", row * (2 * kHc + 1), [&](int, const OpContext& c) {
        ops.hc_post({.f = input, .post = posts, .comb = combs, .streams = streams}, c);
      });
      report("embed", row * (kHc + 1), [&](int, const OpContext& c) {
        ops.embed({.ids = reinterpret_cast<const int32_t*>(token_ids.data()),
                   .table = ConstTensor(table.data(), DType::kBf16, {kVocab, kWidth}),
                   .streams = streams},
                  c);
      });
      report("route", tokens * (kExperts + 2.0 * kTopK) * 4, [&](int, const OpContext& c) {
        ops.route({.logits = ConstTensor(logits.data(), DType::kF32, {tokens, kExperts}),
                   .bias = ConstTensor(bias.data(), DType::kF32, {kExperts}),
                   .tid2eid = {},
                   .token_ids = reinterpret_cast<const int32_t*>(token_ids.data()),
                   .scaling = 1.5f,
                   .expert_ids = Tensor(ids.data(), DType::kI32, {tokens, kTopK}),
                   .expert_weights = Tensor(weights.data(), DType::kF32, {tokens, kTopK})},
                  c);
      });
    }
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--quick") {
      options.quick = true;
    } else if (flag == "--op" && i + 1 < argc) {
      options.op = argv[++i];
    } else if (flag == "--candidate" && i + 1 < argc) {
      options.candidate = argv[++i];
    } else if (flag == "--case" && i + 1 < argc) {
      options.which = argv[++i];
    } else {
      std::fprintf(stderr,
                   "usage: %s [--op top_k|logits|prefill|rows] [--candidate NAME] [--case TEXT] "
                   "[--quick]\n",
                   argv[0]);
      std::exit(2);
    }
  }
  return options;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  Bench bench(options);
  const auto wanted = [&](std::string_view op) { return options.op.empty() || options.op == op; };
  if (wanted("top_k")) bench_top_k(bench);
  if (wanted("logits")) bench_logits(bench, kDecodeCases, "index_logits, paged decode");
  if (wanted("rows")) bench_rows(bench);
  if (wanted("prefill")) bench_logits(bench, kPrefillCases, "index_logits, prefill");
  return 0;
}

}  // namespace
}  // namespace dsv4::nvidia

int main(int argc, char** argv) {
  try {
    return dsv4::nvidia::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
