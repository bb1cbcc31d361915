// Row-wise operations of a V4-Flash CSA layer (64 heads x 512, indexer 64 x 128) and of an HCA
// layer on an NVIDIA GPU: time, GB/s and the share of a copy of the same device.
//
//   cuda_rowwise_bench [--filter TEXT] [--tokens 1,64,4096]
//
// The compressor also at 16,384 and 65,536 tokens, where nothing else is asked for: launches and
// waits that every step has once are 5 to 10 us.
//
// Time: a CUDA graph of launches over up to 64 rotating inputs (256 MB where they are large, so
// that those are cold), replayed; median over replays / launches. GB/s counts every operand and
// result once. One token is latency, not bandwidth: look at its microseconds.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "backends/nvidia/cuda_device.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "cache/kv_format.h"
#include "dsv4/backend.h"
#include "ops/ops.h"

namespace dsv4::nvidia {
namespace {

constexpr int64_t kColdBytes = 256 << 20;
constexpr int64_t kHidden = 4096, kQLora = 1024, kHeads = 64, kHeadDim = 512;
constexpr int64_t kIndexHeads = 64, kIndexDim = 128, kTopk = 512;
constexpr int kRopeDim = 64, kFirstPosition = 32768, kReplays = 9;

class Bench {
 public:
  explicit Bench(std::string filter) : filter_(std::move(filter)), device_(open_cuda_device(0)) {
    DSV4_CUDA_CHECK(cudaStreamCreate(&stream_));
    copy_bytes_per_us_ = measure_copy();
    std::printf("%s, copy %.0f GB/s\n", device_->description().c_str(), copy_bytes_per_us_ * 1e-3);
    std::printf("%-34s %7s %9s %9s %7s\n", "operation", "tokens", "us", "GB/s", "share");
  }
  ~Bench() { cudaStreamDestroy(stream_); }
  const Ops& ops() const { return device_->ops(); }
  bool wants(const char* name) const {
    return std::string_view(name).find(filter_) != std::string_view::npos;
  }

  template <typename T>
  T* upload(const std::vector<T>& values) {
    T* data = reinterpret_cast<T*>(raw(static_cast<int64_t>(values.size() * sizeof(T)), 0));
    DSV4_CUDA_CHECK(
        cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return data;
  }
  /// Numbers around 1 of either type: any byte pattern with that exponent will do.
  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape) {
    Tensor out(nullptr, dtype, shape);
    out.data = raw(out.num_bytes(), 0x3f);
    return out;
  }
  std::byte* raw(int64_t bytes, int fill) {
    owned_.push_back(device_->allocate(std::max<int64_t>(bytes, 1)));
    DSV4_CUDA_CHECK(cudaMemset(owned_.back().data(), fill, static_cast<size_t>(bytes)));
    return owned_.back().data();
  }
  CacheView cache(KvFormat format, int64_t rows, int64_t elems) {
    constexpr int64_t kRows = 64;
    const int64_t blocks = (rows + kRows - 1) / kRows;
    const int64_t stride = page_bytes(format, kRows, static_cast<int>(elems));
    return {raw(blocks * stride, 0),     stride, static_cast<int32_t>(blocks),
            static_cast<int32_t>(kRows), format, static_cast<int32_t>(elems)};
  }

  /// `make(set)` allocates the arguments of one input set and returns the call.
  using Call = std::function<void(const OpContext&)>;
  void report(const char* name, int64_t tokens, int64_t bytes,
              const std::function<Call(int set)>& make) {
    if (!wants(name)) return;
    const int64_t sets = std::clamp<int64_t>(kColdBytes / bytes, 1, 64);
    std::vector<Call> calls;
    for (int64_t s = 0; s < sets; ++s) calls.push_back(make(static_cast<int>(s)));
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.head_dim = kHeadDim;
    std::byte* scratch = raw(ops().scratch_bytes(limits), 0);
    const int64_t scratch_bytes = ops().scratch_bytes(limits);
    const int launches = static_cast<int>(std::max<int64_t>(sets, 20));
    const double us = time(launches, [&](int i) {
      Arena arena(scratch, scratch_bytes);
      calls[static_cast<size_t>(i) % calls.size()]({{stream_}, &arena, &ops()});
    });
    const double rate = static_cast<double>(bytes) / us;
    std::printf("%-34s %7lld %9.2f %9.0f %6.0f%%\n", name, static_cast<long long>(tokens), us,
                rate * 1e-3, 100 * rate / copy_bytes_per_us_);
    std::fflush(stdout);
    calls.clear();
    owned_.clear();
  }

 private:
  // Microseconds of one of `launches` calls in a graph.
  double time(int launches, const std::function<void(int)>& call) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    DSV4_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) call(i);
    DSV4_CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
    DSV4_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    cudaEvent_t begin, end;
    DSV4_CUDA_CHECK(cudaEventCreate(&begin));
    DSV4_CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int replay = 0; replay < kReplays + 2; ++replay) {
      DSV4_CUDA_CHECK(cudaEventRecord(begin, stream_));
      DSV4_CUDA_CHECK(cudaGraphLaunch(executable, stream_));
      DSV4_CUDA_CHECK(cudaEventRecord(end, stream_));
      DSV4_CUDA_CHECK(cudaEventSynchronize(end));
      float milliseconds = 0;
      DSV4_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
      if (replay >= 2) times.push_back(milliseconds);
    }
    std::sort(times.begin(), times.end());
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    return 1e3 * times[times.size() / 2] / launches;
  }
  // Of plain copies, once clocks are up; in a graph they may go through a slower engine.
  double measure_copy() {
    constexpr int64_t kBytes = int64_t{1} << 29;
    constexpr int kCopies = 20;
    const Buffer from = device_->allocate(kBytes), to = device_->allocate(kBytes);
    cudaEvent_t begin, end;
    DSV4_CUDA_CHECK(cudaEventCreate(&begin));
    DSV4_CUDA_CHECK(cudaEventCreate(&end));
    float milliseconds = 0;
    for (int run = 0; run < 10; ++run) {
      DSV4_CUDA_CHECK(cudaEventRecord(begin, stream_));
      for (int i = 0; i < kCopies; ++i) {
        DSV4_CUDA_CHECK(
            cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream_));
      }
      DSV4_CUDA_CHECK(cudaEventRecord(end, stream_));
      DSV4_CUDA_CHECK(cudaEventSynchronize(end));
      DSV4_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return 2.0 * kCopies * kBytes / (1e3 * milliseconds);
  }

  std::string filter_;
  std::unique_ptr<Device> device_;
  cudaStream_t stream_ = nullptr;
  double copy_bytes_per_us_ = 0;
  std::vector<Buffer> owned_;
};

// Tokens of one sequence, or one each of many; the last token of every `ratio` emits an entry.
struct Step {
  std::vector<int32_t> positions, token_to_seq, query_start{0}, context_len, state_slot;
  std::vector<int64_t> slots, ratio_slots;
  int64_t entries = 0;
  Step(int64_t tokens, int ratio, int64_t seqs = 1, int64_t context = -1) {
    // A single token completes an entry, as the costly decode step does.
    if (context < 0) context = kFirstPosition + ratio - 1;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = context + (seqs == 1 ? t : 0);
      positions.push_back(static_cast<int32_t>(position));
      token_to_seq.push_back(static_cast<int32_t>(seqs == 1 ? 0 : t));
      slots.push_back(t);
      const bool emits = (position + 1) % ratio == 0;
      ratio_slots.push_back(emits ? entries++ : -1);
    }
    for (int64_t s = 0; s < seqs; ++s) {
      query_start.push_back(static_cast<int32_t>(tokens / seqs * (s + 1)));
      context_len.push_back(static_cast<int32_t>(context));
      state_slot.push_back(static_cast<int32_t>(s));
    }
  }
};

void bench_norms(Bench& bench, int64_t tokens) {
  for (int64_t n : {kHidden, kQLora}) {
    bench.report(n == kHidden ? "rms_norm 4096" : "rms_norm 1024", tokens, 4 * tokens * n,
                 [&](int) -> Bench::Call {
                   const RmsNormParams params{.x = bench.tensor(DType::kBf16, {tokens, n}),
                                              .weight = bench.tensor(DType::kBf16, {n}),
                                              .eps = 1e-6f,
                                              .out = bench.tensor(DType::kBf16, {tokens, n})};
                   return [=, &bench](const OpContext& c) { bench.ops().rms_norm(params, c); };
                 });
  }
}

RopeView rope(Bench& bench) {
  std::vector<float> frequencies;
  for (int i = 0; i < kRopeDim / 2; ++i)
    frequencies.push_back(static_cast<float>(std::pow(160000.0, -2.0 * i / kRopeDim)));
  return {bench.upload(frequencies), kRopeDim};
}

void bench_heads(Bench& bench, int64_t tokens) {
  const Step step(tokens, 4);
  const int64_t q_bytes = 2 * tokens * kHeads * kHeadDim;
  bench.report("qnorm_rope_insert fp8_ds_mla", tokens, 2 * q_bytes + tokens * (4 * kHeadDim + 584),
               [&](int) -> Bench::Call {
                 const QnormRopeInsertParams params{
                     .q = bench.tensor(DType::kBf16, {tokens, kHeads, kHeadDim}),
                     .kv = bench.tensor(DType::kBf16, {tokens, kHeadDim}),
                     .rope = rope(bench),
                     .eps = 1e-6f,
                     .positions = bench.upload(step.positions),
                     .slot_mapping = bench.upload(step.slots),
                     .window = bench.cache(KvFormat::kFp8DsMla, tokens, kHeadDim)};
                 return
                     [=, &bench](const OpContext& c) { bench.ops().qnorm_rope_insert(params, c); };
               });
  for (bool quantise : {false, true}) {
    bench.report(quantise ? "inverse_rope quantised" : "inverse_rope", tokens, 2 * q_bytes,
                 [&](int) -> Bench::Call {
                   const InverseRopeParams params{
                       .o = bench.tensor(DType::kBf16, {tokens, kHeads, kHeadDim}),
                       .rope = rope(bench),
                       .positions = bench.upload(step.positions),
                       .quantise = quantise,
                       .out = bench.tensor(DType::kBf16, {tokens, kHeads, kHeadDim})};
                   return [=, &bench](const OpContext& c) { bench.ops().inverse_rope(params, c); };
                 });
  }
  for (KvFormat format : {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4}) {
    const bool fp4 = format == KvFormat::kIndexMxfp4;
    const bool codes = !fp4 && bench.ops().index_takes_e4m3;
    const DType out = codes ? DType::kF8E4M3 : DType::kBf16;
    bench.report(fp4 ? "index_query mxfp4, Hadamard" : "index_query fp8", tokens,
                 tokens * kIndexHeads * ((2 + size_of(out)) * kIndexDim + 6),
                 [&](int) -> Bench::Call {
                   const IndexQueryParams params{
                       .q = bench.tensor(DType::kBf16, {tokens, kIndexHeads, kIndexDim}),
                       .weights = bench.tensor(DType::kBf16, {tokens, kIndexHeads}),
                       .rope = rope(bench),
                       .positions = bench.upload(step.positions),
                       .format = format,
                       .hadamard = fp4,
                       .q_out = bench.tensor(out, {tokens, kIndexHeads, kIndexDim}),
                       .weights_out = bench.tensor(DType::kF32, {tokens, kIndexHeads})};
                   return [=, &bench](const OpContext& c) { bench.ops().index_query(params, c); };
                 });
  }
}

void bench_compress(Bench& bench, int64_t tokens) {
  struct Case {
    const char* name;
    int ratio;
    bool overlap;
    int64_t width;
    KvFormat format;
    bool decode = false, emits = true;  // decode: every token is of another sequence
  };
  for (const Case& which :
       {Case{"compress 4 fp8_ds_mla", 4, true, kHeadDim, KvFormat::kFp8DsMla},
        Case{"compress 128 fp8_ds_mla", 128, false, kHeadDim, KvFormat::kFp8DsMla},
        Case{"compress 4 index_fp8", 4, true, kIndexDim, KvFormat::kIndexFp8},
        Case{"decode, compress 4 fp8_ds_mla", 4, true, kHeadDim, KvFormat::kFp8DsMla, true},
        Case{"decode, compress 128 fp8_ds_mla", 128, false, kHeadDim, KvFormat::kFp8DsMla, true},
        Case{"the same, no entries", 128, false, kHeadDim, KvFormat::kFp8DsMla, true, false}}) {
    if (which.decode && tokens > 256) continue;
    const int64_t seqs = which.decode ? tokens : 1;
    const Step step(tokens, which.ratio, seqs, which.emits ? -1 : kFirstPosition);
    const int windows = which.overlap ? 2 : 1;
    const int64_t half = windows * which.width, ring = windows * which.ratio;
    // Rows of this step once; of the rings what the first entries need, and what is kept.
    const int64_t from_ring = seqs * std::min<int64_t>(ring - 1, step.entries / seqs * ring);
    const int64_t kept = std::min(tokens, seqs * ring);
    const int64_t bytes = (tokens + (from_ring + kept) / windows) * 2 * half * 4 +
                          step.entries * page_bytes(which.format, 1, static_cast<int>(which.width));
    bench.report(which.name, tokens, bytes, [&](int) -> Bench::Call {
      const int64_t slot_stride = ring * 2 * half;
      const auto ratio = std::make_shared<RatioPlan>(
          RatioPlan{which.ratio, bench.upload(step.ratio_slots), nullptr, nullptr});
      const auto plan = std::make_shared<PlanView>();
      plan->num_tokens = static_cast<int32_t>(tokens);
      plan->num_seqs = static_cast<int32_t>(seqs);
      plan->max_query_len = static_cast<int32_t>(tokens / seqs);
      plan->query_start = bench.upload(step.query_start);
      plan->context_len = bench.upload(step.context_len);
      plan->state_slot = bench.upload(step.state_slot);
      plan->positions = bench.upload(step.positions);
      plan->token_to_seq = bench.upload(step.token_to_seq);
      plan->ratios = {ratio.get(), 1};
      const CompressParams params{
          .plan = plan.get(),
          .ratio = ratio.get(),
          .overlap = which.overlap,
          .gates = bench.tensor(DType::kF32, {tokens, 2 * half}),
          .ape = bench.tensor(DType::kF32, {which.ratio, half}),
          .norm = bench.tensor(DType::kBf16, {which.width}),
          .eps = 1e-6f,
          .rope = rope(bench),
          .hadamard = false,
          .activation = DType::kBf16,
          .state = {reinterpret_cast<float*>(bench.raw(seqs * slot_stride * 4, 0x3f)), slot_stride,
                    static_cast<int32_t>(seqs), static_cast<int32_t>(ring),
                    static_cast<int32_t>(2 * half)},
          .cache = bench.cache(which.format, std::max<int64_t>(1, step.entries), which.width),
          .entries = {}};
      return [params, plan, ratio, &bench](const OpContext& c) { bench.ops().compress(params, c); };
    });
  }
}

void bench_moves(Bench& bench, int64_t tokens) {
  bench.report("map_slots 512", tokens, 8 * tokens * kTopk, [&](int) -> Bench::Call {
    constexpr int32_t kColumns = 1024;
    const MapSlotsParams params{
        .topk_indices = ConstTensor(bench.raw(4 * tokens * kTopk, 0), DType::kI32, {tokens, kTopk}),
        .token_to_seq = bench.upload(std::vector<int32_t>(static_cast<size_t>(tokens), 0)),
        .blocks = {bench.upload(std::vector<int32_t>(kColumns, 1)), kColumns, kColumns, 256},
        .rows_per_block = 64,
        .slots = Tensor(bench.raw(4 * tokens * kTopk, 0), DType::kI32, {tokens, kTopk})};
    return [=, &bench](const OpContext& c) { bench.ops().map_slots(params, c); };
  });
  bench.report("gather_rows 4096", tokens, 4 * tokens * kHidden, [&](int) -> Bench::Call {
    std::vector<int32_t> rows;
    for (int64_t t = 0; t < tokens; ++t) rows.push_back(static_cast<int32_t>(tokens - 1 - t));
    const GatherRowsParams params{.x = bench.tensor(DType::kBf16, {tokens, kHidden}),
                                  .rows = bench.upload(rows),
                                  .out = bench.tensor(DType::kBf16, {tokens, kHidden})};
    return [=, &bench](const OpContext& c) { bench.ops().gather_rows(params, c); };
  });
  bench.report("zero 64 x 512", tokens, 2 * tokens * kHeads * kHeadDim, [&](int) -> Bench::Call {
    const ZeroParams params{.out = bench.tensor(DType::kBf16, {tokens, kHeads, kHeadDim})};
    return [=, &bench](const OpContext& c) { bench.ops().zero(params, c); };
  });
}

void run(int argc, char** argv) {
  std::string filter;
  std::vector<int64_t> token_counts{1, 64, 4096}, compressor_counts{16384, 65536};
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--filter") == 0) filter = argv[i + 1];
    if (std::strcmp(argv[i], "--tokens") == 0) {
      token_counts.clear(), compressor_counts.clear();
      std::stringstream list(argv[i + 1]);
      for (std::string item; std::getline(list, item, ',');)
        token_counts.push_back(std::stoll(item));
    }
  }
  Bench bench(filter);
  for (int64_t tokens : token_counts) {
    bench_norms(bench, tokens);
    bench_heads(bench, tokens);
    bench_compress(bench, tokens);
    bench_moves(bench, tokens);
  }
  for (int64_t tokens : compressor_counts) bench_compress(bench, tokens);
}

}  // namespace
}  // namespace dsv4::nvidia

int main(int argc, char** argv) {
  try {
    dsv4::nvidia::run(argc, argv);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_rowwise_bench: %s\n", error.what());
    return 1;
  }
}
