// Dense products on a GPU at the projection shapes of the released models, against the time that
// reading the weights or the arithmetic must take.
//
//   cuda_linear_bench [--candidate NAME] [--products f32|fp8] [--filter TEXT] [--tokens M]
//
// "flash moe" is the whole operation with 256 experts, random ones for each token.
//
// A graph of calls is replayed; weights rotate through more bytes than the L2 holds. Time is the
// median of replays divided by the calls. Anchors are the times of DeepGEMM's kernels of the same
// products with quantised input handed over (an H200, graph replay, the same method).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "backends/nvidia/candidates.h"
#include "backends/nvidia/cuda_device.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "core/arena.h"
#include "core/fail.h"
#include "dsv4/backend.h"

namespace dsv4::nvidia {
namespace {

constexpr DType kFp8 = DType::kF8E4M3, kFp4 = DType::kF4E2M1, kBf16 = DType::kBf16,
                kF32 = DType::kF32;
constexpr int64_t kColdBytes = int64_t{256} << 20;  // four times the L2
constexpr double kGigabytes = 4274, kFp8Tflops = 1500, kBf16Tflops = 790, kF32Tflops = 60;
constexpr int kReplays = 9;
constexpr double kReplaySeconds = 2.5e-3;

struct Shape {
  const char* name;
  DType x, w, out;
  bool quantise;
  int64_t rows, cols;
  int problems;  // of one call
  bool shared_x;
  std::vector<std::pair<int, double>> tokens;  // and DeepGEMM's microseconds, 0: none
};

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {"flash wo_a",
       kBf16,
       kFp8,
       kBf16,
       false,
       1024,
       4096,
       8,
       false,
       {{1, 12.2}, {8, 12.3}, {16, 0}, {64, 12.3}, {128, 13.5}, {512, 28.1}, {4096, 205}}},
      {"pro wo_a",
       kBf16,
       kFp8,
       kBf16,
       false,
       1024,
       4096,
       16,
       false,
       {{1, 21.6}, {8, 20.8}, {64, 21.4}, {128, 23.6}, {512, 53.9}, {4096, 426}}},
      {"flash wq_b",
       kBf16,
       kFp8,
       kBf16,
       true,
       32768,
       1024,
       1,
       true,
       {{1, 13.9}, {8, 13.2}, {16, 0}, {64, 13.0}, {128, 13.7}, {512, 31.9}, {4096, 218}}},
      {"flash wo_b",
       kBf16,
       kFp8,
       kBf16,
       true,
       4096,
       8192,
       1,
       true,
       {{1, 16.8}, {8, 13.3}, {16, 0}, {64, 12.6}, {128, 13.5}, {512, 26.4}, {4096, 190}}},
      {"pro wq_b",
       kBf16,
       kFp8,
       kBf16,
       true,
       65536,
       1536,
       1,
       true,
       {{1, 29.6}, {8, 29.6}, {64, 29.8}, {128, 35.3}, {512, 84.6}, {4096, 606}}},
      {"pro wo_b",
       kBf16,
       kFp8,
       kBf16,
       true,
       7168,
       16384,
       1,
       true,
       {{1, 36.0}, {8, 35.5}, {64, 35.5}, {128, 42.1}, {512, 115}, {4096, 652}}},
      {"flash wq_a + wkv",
       kBf16,
       kFp8,
       kBf16,
       true,
       768,
       4096,
       2,
       true,
       {{1, 0}, {8, 0}, {16, 0}, {64, 0}, {128, 0}, {512, 0}, {4096, 0}}},
      {"flash gates",
       kBf16,
       kBf16,
       kF32,
       false,
       1024,
       4096,
       2,
       true,
       {{1, 0}, {8, 0}, {16, 0}, {64, 0}, {4096, 0}}},
      {"flash router", kBf16, kBf16, kF32, false, 256, 4096, 1, true, {{1, 0}, {64, 0}, {4096, 0}}},
      {"flash expert w1",
       kBf16,
       kFp4,
       kF32,
       true,
       2048,
       4096,
       12,
       true,
       {{1, 0}, {8, 0}, {16, 0}, {64, 0}, {512, 0}}},
      {"flash head", kF32, kBf16, kF32, false, 129280, 4096, 1, true, {{1, 0}, {8, 0}, {64, 0}}},
  };
  return all;
}

// Device memory of the bench, freed at exit by the driver.
std::byte* device_bytes(int64_t bytes) {
  void* data = nullptr;
  DSV4_CUDA_CHECK(cudaMalloc(&data, static_cast<size_t>(bytes)));
  return static_cast<std::byte*>(data);
}

// Bytes that are no NaN in any format: words with the pattern of `mask`, repeated.
void fill(std::byte* to, int64_t bytes, uint64_t mask) {
  std::vector<uint64_t> block(size_t{1} << 20);
  uint64_t state = 1;
  for (uint64_t& word : block) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    word = (state ^ state >> 29) & mask;
  }
  const auto block_bytes = static_cast<int64_t>(block.size() * 8);
  for (int64_t at = 0; at < bytes; at += block_bytes) {
    DSV4_CUDA_CHECK(cudaMemcpy(to + at, block.data(),
                               static_cast<size_t>(std::min(block_bytes, bytes - at)),
                               cudaMemcpyHostToDevice));
  }
}

class Bench {
 public:
  Bench(const std::string& candidate, Products products)
      : device_(open_cuda_device(0)),
        ops_(make_ops(find_devices(Platform::kCuda).devices.at(0).capability,
                      candidate.empty() ? "" : "linear:" + candidate)),
        products_(products),
        stream_(stream_of(device_->default_stream())) {
    std::printf("%s, linear:%s, %s products\n", device_->description().c_str(),
                candidate.empty() ? "best" : candidate.c_str(), products_name(products));
    std::printf("%-17s %5s %9s %9s %9s %9s %6s %9s %6s\n", "product", "M", "us", "TFLOP/s", "GB/s",
                "floor us", "x", "DeepGEMM", "ratio");
    weights_ = device_bytes(kWeightBytes);
    fill(weights_, kWeightBytes, 0x3fbf3fbf3fbf3fbfu);
    scales_ = device_bytes(kScaleBytes);
    DSV4_CUDA_CHECK(cudaMemset(scales_, 120, kScaleBytes));
    x_ = device_bytes(kXBytes);
    fill(x_, kXBytes, 0xbfbfbfbfbfbfbfbfu);
    x_scales_ = reinterpret_cast<float*>(device_bytes(kScaleBytes));
    fill(reinterpret_cast<std::byte*>(x_scales_), kScaleBytes, 0x3f3f3f3f3f3f3f3fu);
    out_scales_ = reinterpret_cast<float*>(device_bytes(kScaleBytes));
    out_ = device_bytes(kOutBytes);
  }

  void run(const Shape& s, int tokens, double anchor_us) {
    const int64_t w_bytes = s.rows * s.cols * (s.w == kFp4 ? 1 : 2 * size_of(s.w)) / 2;
    const int64_t scale_bytes = s.w == kFp4   ? s.rows * s.cols / 32
                                : s.w == kFp8 ? (s.rows + 127) / 128 * s.cols / 128
                                              : 0;
    const int64_t call_bytes = w_bytes * s.problems;
    const int64_t sets = std::clamp<int64_t>(kColdBytes / call_bytes, 1, kWeightBytes / call_bytes);
    const int64_t out_bytes = tokens * s.rows * size_of(s.out);
    DSV4_CHECK(out_bytes * s.problems <= kOutBytes && call_bytes <= kWeightBytes);
    DSV4_CHECK(scale_bytes * s.problems <= kScaleBytes);
    std::vector<LinearProblem> problems(static_cast<size_t>(s.problems));
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.max_cols = s.cols;
    limits.max_rows = s.rows;
    if (!s.shared_x) {  // the groups of wo_a are the heads
      limits.num_heads = s.problems;
      limits.head_dim = static_cast<int>(s.cols);
    }
    const int64_t scratch_bytes = ops_.scratch_bytes(limits);
    std::byte* scratch = device_bytes(scratch_bytes);
    const auto call = [&](int64_t set) {
      for (int p = 0; p < s.problems; ++p) {
        const Weight w{.dtype = s.w,
                       .data = weights_ + set * call_bytes + p * w_bytes,
                       .rows = s.rows,
                       .cols = s.cols,
                       .row_stride = s.cols,
                       .scale = scale_bytes == 0
                                    ? nullptr
                                    : reinterpret_cast<const uint8_t*>(scales_) + p * scale_bytes,
                       .scale_stride = s.w == kFp4 ? s.cols / 32 : s.cols / 128};
        // Problems with an x of their own lie side by side, as the groups of wo_a.
        const int64_t x_cols = s.shared_x ? s.cols : s.cols * s.problems;
        ConstTensor x(x_ + (s.shared_x ? 0 : p * s.cols * size_of(s.x)), s.x, {tokens, s.cols});
        x.strides[0] = x_cols;
        LinearProblem& problem = problems[static_cast<size_t>(p)];
        problem = {x, w, Tensor(out_ + p * out_bytes, s.out, {tokens, s.rows})};
        // The step before hands over codes, and wo_a hands some to wo_b.
        if (s.w == kFp8 && s.problems != 2 && products_ == Products::kFp8) {
          problem.x = ConstTensor(x_ + p * s.cols, kFp8, {tokens, s.cols});
          problem.x.strides[0] = x_cols;
          const int64_t stride = row_scale_stride(tokens);
          problem.x_scale = {x_scales_ + p * s.cols / 128 * stride, stride};
          if (!s.quantise) {
            problem.out.dtype = kFp8;
            problem.out_scale = {out_scales_ + p * s.rows / 128 * stride, stride};
          }
        }
      }
      Arena arena(scratch, scratch_bytes);
      ops_.linear({.problems = problems,
                   .quantise_input = s.quantise,
                   .quantised_input = !s.quantise && s.w == kFp8,
                   .products = products_},
                  {device_->default_stream(), &arena, &ops_});
    };
    const double us = time_graph(sets, call);
    const double flops = 2.0 * tokens * static_cast<double>(s.rows * s.cols) * s.problems;
    const double bytes =
        static_cast<double>(s.problems) * static_cast<double>(w_bytes + scale_bytes + out_bytes) +
        static_cast<double>((s.shared_x ? 1 : s.problems) * tokens * s.cols * size_of(s.x));
    const double rate = s.x == kF32 ? kF32Tflops : s.w == kFp8 ? kFp8Tflops : kBf16Tflops;
    const double floor_us = std::max(flops / rate * 1e-6, bytes / kGigabytes * 1e-3);
    std::printf("%-17s %5d %9.1f %9.0f %9.0f %9.1f %6.2f", s.name, tokens, us, flops / us * 1e-6,
                bytes / us * 1e-3, floor_us, us / floor_us);
    if (anchor_us > 0) std::printf(" %9.1f %6.2f", anchor_us, us / anchor_us);
    std::printf("\n");
    std::fflush(stdout);
    DSV4_CUDA_CHECK(cudaFree(scratch));
  }

  // Routed experts FP4, the shared one FP8; every call of a graph has experts of its own.
  void run_moe(int tokens) {
    constexpr int64_t kHidden = 4096, kInter = 2048, kExperts = 256, kTopK = 6, kSets = 16;
    constexpr int64_t kMatrix = kHidden * kInter / 2, kScales = kHidden * kInter / 32;
    if (expert_weights_ == nullptr) {
      expert_weights_ = device_bytes(3 * kExperts * (kMatrix + kScales));
      fill(expert_weights_, 3 * kExperts * kMatrix, ~uint64_t{0});
      DSV4_CUDA_CHECK(cudaMemset(expert_weights_ + 3 * kExperts * kMatrix, 120,
                                 static_cast<size_t>(3 * kExperts * kScales)));
    }
    const auto* scales = reinterpret_cast<const uint8_t*>(expert_weights_ + 3 * kExperts * kMatrix);
    const auto fp4 = [&](int64_t idx, int64_t rows, int64_t cols) {
      return Weight{.dtype = kFp4,
                    .data = expert_weights_ + idx * kMatrix,
                    .rows = rows,
                    .cols = cols,
                    .row_stride = cols,
                    .scale = scales + idx * kScales,
                    .scale_stride = cols / 32};
    };
    const auto fp8 = [&](int64_t idx, int64_t rows, int64_t cols) {
      return Weight{.dtype = kFp8,
                    .data = weights_ + idx * kHidden * kInter,
                    .rows = rows,
                    .cols = cols,
                    .row_stride = cols,
                    .scale = reinterpret_cast<const uint8_t*>(scales_),
                    .scale_stride = cols / 128};
    };
    std::vector<ExpertWeights> experts;
    for (int64_t e = 0; e < kExperts; ++e) {
      experts.push_back({fp4(3 * e, kInter, kHidden), fp4(3 * e + 1, kInter, kHidden),
                         fp4(3 * e + 2, kHidden, kInter)});
    }
    std::mt19937 random(1);
    std::vector<int32_t> ids;
    size_t visited = 0;
    for (int64_t set = 0; set < kSets; ++set) {
      std::set<int32_t> of_set;
      for (int t = 0; t < tokens; ++t) {
        std::set<int32_t> of_token;
        while (of_token.size() < kTopK) of_token.insert(static_cast<int32_t>(random() % kExperts));
        ids.insert(ids.end(), of_token.begin(), of_token.end());
        of_set.insert(of_token.begin(), of_token.end());
      }
      visited += of_set.size();
    }
    const auto id_bytes = static_cast<int64_t>(ids.size() * sizeof(int32_t));
    std::byte* device_ids = device_bytes(id_bytes);
    DSV4_CUDA_CHECK(
        cudaMemcpy(device_ids, ids.data(), static_cast<size_t>(id_bytes), cudaMemcpyHostToDevice));
    std::byte* weights = device_bytes(tokens * kTopK * 4);
    fill(weights, tokens * kTopK * 4, 0x3f3f3f3f3f3f3f3fu);
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.max_cols = limits.max_rows = limits.hidden_size = kHidden;
    limits.moe_intermediate = kInter;
    limits.num_experts = kExperts;
    limits.experts_per_token = kTopK;
    const int64_t scratch_bytes = ops_.scratch_bytes(limits);
    std::byte* scratch = device_bytes(scratch_bytes);
    const double us = time_graph(kSets, [&](int64_t set) {
      Arena arena(scratch, scratch_bytes);
      ops_.moe({.x = ConstTensor(x_, kBf16, {tokens, kHidden}),
                .expert_ids = ConstTensor(device_ids + set * tokens * kTopK * 4, DType::kI32,
                                          {tokens, kTopK}),
                .expert_weights = ConstTensor(weights, kF32, {tokens, kTopK}),
                .experts = experts,
                .shared = {fp8(3 * set, kInter, kHidden), fp8(3 * set + 1, kInter, kHidden),
                           fp8(3 * set + 2, kHidden, kInter)},
                .swiglu_limit = 10.0f,
                .quantise_input = true,
                .out = Tensor(out_, kBf16, {tokens, kHidden})},
               {device_->default_stream(), &arena, &ops_});
    });
    const double flops = 6.0 * tokens * (kTopK + 1) * kHidden * kInter;
    const double bytes = static_cast<double>(visited) / kSets * 3 * (kMatrix + kScales) +
                         3.0 * kHidden * kInter + 4.0 * tokens * kHidden;
    const double floor_us = std::max(flops / kBf16Tflops * 1e-6, bytes / kGigabytes * 1e-3);
    std::printf("%-17s %5d %9.1f %9.0f %9.0f %9.1f %6.2f\n", "flash moe", tokens, us,
                flops / us * 1e-6, bytes / us * 1e-3, floor_us, us / floor_us);
    std::fflush(stdout);
    for (std::byte* piece : {device_ids, weights, scratch}) DSV4_CUDA_CHECK(cudaFree(piece));
  }

 private:
  static constexpr int64_t kWeightBytes = int64_t{1100} << 20, kScaleBytes = int64_t{16} << 20,
                           kXBytes = int64_t{768} << 20, kOutBytes = int64_t{1200} << 20;

  template <typename Call>
  double time_graph(int64_t sets, Call&& call) {
    call(0);
    DSV4_CUDA_CHECK(cudaStreamSynchronize(stream_));
    cudaEvent_t begin, end;
    DSV4_CUDA_CHECK(cudaEventCreate(&begin));
    DSV4_CUDA_CHECK(cudaEventCreate(&end));
    const auto timed = [&](auto&& body) {
      float milliseconds = 0;
      DSV4_CUDA_CHECK(cudaEventRecord(begin, stream_));
      body();
      DSV4_CUDA_CHECK(cudaEventRecord(end, stream_));
      DSV4_CUDA_CHECK(cudaEventSynchronize(end));
      DSV4_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
      return milliseconds * 1e-3;
    };
    const double once = timed([&] { call(0); });
    const int64_t calls = std::max<int64_t>(
        sets, std::min<int64_t>(400, static_cast<int64_t>(kReplaySeconds / once)));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    DSV4_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int64_t i = 0; i < calls; ++i) call(i % sets);
    DSV4_CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
    DSV4_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    DSV4_CUDA_CHECK(cudaGraphLaunch(exec, stream_));
    std::vector<double> seconds;
    for (int i = 0; i < kReplays; ++i)
      seconds.push_back(timed([&] { DSV4_CUDA_CHECK(cudaGraphLaunch(exec, stream_)); }));
    DSV4_CUDA_CHECK(cudaGraphExecDestroy(exec));
    DSV4_CUDA_CHECK(cudaGraphDestroy(graph));
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::nth_element(seconds.begin(), seconds.begin() + kReplays / 2, seconds.end());
    return seconds[kReplays / 2] / static_cast<double>(calls) * 1e6;
  }

  std::unique_ptr<Device> device_;
  Ops ops_;
  Products products_;
  cudaStream_t stream_;
  std::byte *weights_, *scales_, *x_, *out_;
  float *x_scales_, *out_scales_;
  std::byte* expert_weights_ = nullptr;
};

int bench_main(int argc, char** argv) {
  std::string candidate, filter;
  Products products = Products::kF32;
  int only_tokens = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--candidate") candidate = value;
    if (option == "--products") products = parse_products(value).value();
    if (option == "--filter") filter = value;
    if (option == "--tokens") only_tokens = std::stoi(value);
  }
  Bench bench(candidate, products);
  for (const Shape& shape : shapes()) {
    if (std::string(shape.name).find(filter) == std::string::npos) continue;
    for (const auto& [tokens, anchor_us] : shape.tokens) {
      if (only_tokens == 0 || only_tokens == tokens) bench.run(shape, tokens, anchor_us);
    }
  }
  if (std::string("flash moe").find(filter) == std::string::npos) return 0;
  for (int tokens : {1, 8, 16, 64, 256, 1024, 4096}) {
    if (only_tokens == 0 || only_tokens == tokens) bench.run_moe(tokens);
  }
  return 0;
}

}  // namespace
}  // namespace dsv4::nvidia

int main(int argc, char** argv) {
  try {
    return dsv4::nvidia::bench_main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
