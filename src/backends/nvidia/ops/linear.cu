// The part of a dense product that all kernels share: which kernel takes a problem, which problems
// share a prepared x and a launch.
#include "backends/nvidia/ops/linear.h"

#include <algorithm>
#include <bit>

#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4::nvidia {
namespace {

constexpr int64_t kAlignment = 16;  // of a piece that the tensor-core kernels copy

bool aligned(const void* data, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row_bytes)) % kAlignment == 0;
}

int64_t prepared_bytes(int64_t rows, int64_t cols) {
  return round_up(rows * round_up(cols, 128) * int64_t{sizeof(uint16_t)}, Arena::kAlignment);
}

void check(const LinearProblem& problem, bool quantise_input) {
  const auto& [x, w, out] = problem;
  DSV4_CHECK(x.rank == 2 && out.rank == 2 && x.shape[0] == out.shape[0]);
  DSV4_CHECK(x.shape[1] == w.cols && out.shape[1] == w.rows);
  DSV4_CHECK(x.strides[1] == 1 && out.strides[1] == 1);
  DSV4_CHECK(x.dtype == DType::kBf16 || x.dtype == DType::kF32);
  DSV4_CHECK(out.dtype == DType::kBf16 || out.dtype == DType::kF32);
  DSV4_CHECK(!quantise_input || x.dtype == DType::kBf16);
  const bool scaled = w.dtype == DType::kF8E4M3 || w.dtype == DType::kF4E2M1;
  DSV4_CHECK(scaled || w.dtype == DType::kBf16 || w.dtype == DType::kF32);
  DSV4_CHECK(!scaled || w.scale != nullptr);
  DSV4_CHECK(w.dtype != DType::kF4E2M1 || (w.cols % 2 == 0 && w.row_stride % 2 == 0));
  DSV4_CHECK(w.rows < INT32_MAX && w.cols < INT32_MAX / 4 && x.shape[0] < INT32_MAX);
}

bool same_view(const ConstTensor& a, const ConstTensor& b) {
  return a.data == b.data && a.dtype == b.dtype && a.shape == b.shape && a.strides == b.strides;
}

// Products of a call, gathered until a launch is full.
class Launches {
 public:
  Launches(const LinearParams& params, const OpContext& context, bool tensor_cores)
      : params_(params), context_(context), tensor_cores_(tensor_cores) {
    for (const LinearProblem& problem : params.problems) {
      if (problem.x.dtype == DType::kBf16)
        budget_ = std::max(budget_, prepared_bytes(problem.x.shape[0], problem.w.cols));
    }
    base_ = context.scratch->take(budget_);
  }

  void add(const LinearProblem& problem) {
    if (problem.x.shape[0] == 0 || problem.w.rows == 0) return;
    check(problem, params_.quantise_input);
    ConstTensor x = problem.x;
    const bool fast = tensor_cores_ && x.dtype == DType::kBf16 && tensor_cores_take(problem.w);
    if (params_.quantise_input || (fast && !aligned(x.data, x.strides[0] * size_of(x.dtype))))
      x = prepared(x);
    DSV4_CHECK(!fast || x.shape[0] * x.strides[0] < UINT32_MAX);
    LinearBatch& batch = fast ? fast_ : slow_;
    if (batch.count == kMaxLinearItems) flush();
    batch.items[batch.count++] = {.w = linear_weight(problem.w),
                                  .x = x.data,
                                  .x_stride = x.strides[0],
                                  .out = problem.out.data,
                                  .out_stride = problem.out.strides[0],
                                  .tokens = static_cast<int32_t>(x.shape[0]),
                                  .first_tile = 0,
                                  .x_f32 = x.dtype == DType::kF32,
                                  .out_f32 = problem.out.dtype == DType::kF32};
    if (fast) max_tokens_ = std::max(max_tokens_, x.shape[0]);
  }

  void flush() {
    const cudaStream_t stream = stream_of(context_.stream);
    launch_linear_fast(fast_, max_tokens_, stream);
    launch_linear_reference(slow_, stream);
    fast_.count = slow_.count = 0;
    max_tokens_ = 0;
  }

 private:
  // Neighbours with the same x share its copy.
  ConstTensor prepared(const ConstTensor& x) {
    if (last_x_ && same_view(x, last_x_)) return last_prepared_;
    const int64_t bytes = prepared_bytes(x.shape[0], x.shape[1]);
    if (used_ + bytes > budget_) {  // later launches reuse the memory: the stream keeps the order
      flush();
      used_ = 0;
    }
    last_x_ = x;
    last_prepared_ = ConstTensor(base_ + used_, DType::kBf16, {x.shape[0], x.shape[1]});
    last_prepared_.strides[0] = round_up(x.shape[1], 128);
    launch_linear_prepare({.x = x.as<uint16_t>(),
                           .x_stride = x.strides[0],
                           .out = reinterpret_cast<uint16_t*>(base_ + used_),
                           .out_stride = last_prepared_.strides[0],
                           .rows = static_cast<int32_t>(x.shape[0]),
                           .cols = static_cast<int32_t>(x.shape[1]),
                           .quantise = params_.quantise_input},
                          stream_of(context_.stream));
    used_ += bytes;
    return last_prepared_;
  }

  const LinearParams& params_;
  const OpContext& context_;
  bool tensor_cores_;
  std::byte* base_ = nullptr;
  int64_t budget_ = 0, used_ = 0;
  ConstTensor last_x_{}, last_prepared_{};
  LinearBatch fast_, slow_;
  int64_t max_tokens_ = 0;
};

template <bool kTensorCores>
void install(Ops& ops) {
  ops.linear = [](const LinearParams& params, const OpContext& context) {
    run_linear(params, context, kTensorCores);
  };
}

}  // namespace

LinearWeight linear_weight(const Weight& weight) {
  const bool fp4 = weight.dtype == DType::kF4E2M1;
  return {
      .dtype = weight.dtype,
      .rows = static_cast<int32_t>(weight.rows),
      .cols = static_cast<int32_t>(weight.cols),
      .block_rows = fp4 ? 1 : weight.block_rows,
      .block_cols = fp4 ? 32 : weight.block_cols,
      .block_cols_log2 =
          fp4 ? 5
              : static_cast<int32_t>(std::bit_width(static_cast<uint32_t>(weight.block_cols))) - 1,
      .row_bytes = fp4 ? weight.row_stride / 2 : weight.row_stride * size_of(weight.dtype),
      .scale_stride = weight.scale_stride,
      .data = static_cast<const uint8_t*>(weight.data),
      .scale = weight.scale};
}

bool tensor_cores_take(const Weight& weight) {
  if (weight.dtype == DType::kF32) return false;
  if (weight.dtype == DType::kF8E4M3 &&
      (weight.block_cols < 128 || !std::has_single_bit(static_cast<uint32_t>(weight.block_cols))))
    return false;
  return aligned(weight.data, linear_weight(weight).row_bytes);
}

void launch_linear_fast(LinearBatch& batch, int64_t max_tokens, cudaStream_t stream) {
  if (max_tokens <= kMaxStreamTokens) {
    launch_linear_stream(batch, max_tokens, stream);
  } else {
    launch_linear_tile(batch, max_tokens, stream);
  }
}

void run_linear(const LinearParams& params, const OpContext& context, bool tensor_cores) {
  const Arena::Scope scope(*context.scratch);
  Launches launches(params, context, tensor_cores);
  if (context.scratch->measuring()) return;
  for (const LinearProblem& problem : params.problems) launches.add(problem);
  launches.flush();
}

std::span<const Candidate> linear_candidates() {
  static constexpr Candidate kCandidates[] = {
      {"linear", "sm80", needs_sm80, install<true>},
      {"linear", "reference", needs_sm80, install<false>},
  };
  return kCandidates;
}

int64_t linear_scratch_bytes(const ScratchLimits& limits) {
  return prepared_bytes(limits.max_tokens, limits.max_cols);
}

}  // namespace dsv4::nvidia
