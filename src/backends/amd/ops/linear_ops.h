// linear over the kernels of linear.h and linear_any.h: which kernel takes a problem, which
// problems share a prepared x and a launch. The launcher is that of gpu/rowwise_ops.h.
#pragma once
#include <algorithm>
#include <bit>

#include "backends/amd/ops/linear.h"
#include "backends/amd/ops/linear_any.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "ops/linear_problem.h"
#include "ops/ops.h"

namespace dsv4::amd {

inline bool rows_aligned(const void* data, int64_t row_bytes, int64_t alignment) {
  return (static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) | row_bytes) % alignment == 0;
}

inline WeightView weight_view(const Weight& weight) {
  const bool fp4 = weight.dtype == DType::kF4E2M1;
  return {.data = static_cast<const uint8_t*>(weight.data),
          .scale = weight.scale,
          .row_bytes = fp4 ? weight.row_stride / 2 : weight.row_stride * size_of(weight.dtype),
          .scale_stride = weight.scale_stride,
          .rows = static_cast<int32_t>(weight.rows),
          .cols = static_cast<int32_t>(weight.cols),
          .block_rows = fp4 ? 1 : weight.block_rows,
          .block_cols = fp4 ? kPieceCols : weight.block_cols,
          .block_cols_log2 =
              fp4 ? 5 : std::countr_zero(static_cast<uint32_t>(std::max(weight.block_cols, 1))),
          .dtype = weight.dtype,
          .scale_words = weight.scale_stride % 4 == 0 && rows_aligned(weight.scale, 0, 4)};
}

/// Can matrix instructions read it (the contract of linear.h)? A property of the weight alone, so
/// that every call takes the same way.
inline bool matrix_takes(const Weight& weight) {
  if (weight.dtype == DType::kF32 || weight.cols % kPieceCols != 0) return false;
  if (weight.dtype == DType::kF8E4M3 &&
      (weight.block_rows % 16 != 0 || weight.block_cols < kGroupCols ||
       !std::has_single_bit(static_cast<uint32_t>(weight.block_cols))))
    return false;
  if (weight.dtype == DType::kF4E2M1 && weight.rows % 4 != 0) return false;
  const int64_t lane_bytes = weight.dtype == DType::kBf16     ? Codes<DType::kBf16>::kLaneBytes
                             : weight.dtype == DType::kF8E4M3 ? Codes<DType::kF8E4M3>::kLaneBytes
                                                              : Codes<DType::kF4E2M1>::kLaneBytes;
  const int64_t row_bytes = weight_view(weight).row_bytes;
  return rows_aligned(weight.data, row_bytes, lane_bytes) && weight.rows * row_bytes < UINT32_MAX;
}

constexpr int64_t kXAlignment = sizeof(Bf16x8);

/// Bytes of a prepared x, whose rows are whole pieces.
inline int64_t prepared_bytes(int64_t rows, int64_t cols) {
  return round_up(rows * round_up(cols, kPieceCols) * int64_t{sizeof(uint16_t)}, Arena::kAlignment);
}

template <typename Launch>
void launch_prepare(const Launch& launch, const ConstTensor& x, Tensor out, bool quantise) {
  const int64_t groups = x.shape[0] * ceil_div(x.shape[1], kQuantiseCols);
  launch.template run<LinearPrepare>(ceil_div(groups, LinearPrepare::kGroups),
                                     {.x = x.as<gpu::Bf16>(),
                                      .x_stride = x.strides[0],
                                      .out = out.as<gpu::Bf16>(),
                                      .out_stride = out.strides[0],
                                      .rows = static_cast<int32_t>(x.shape[0]),
                                      .cols = static_cast<int32_t>(x.shape[1]),
                                      .quantise = quantise});
}

/// Starts the batch, empties it.
template <typename Kernel, typename Launch>
void launch_batch(const Launch& launch, LinearBatch& batch) {
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    LinearItem& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, Kernel::kTileRows) * ceil_div(item.tokens, Kernel::kTileTokens);
  }
  DSV4_CHECK(tiles < INT32_MAX);
  if (batch.count > 0) launch.template run<Kernel>(tiles, batch);
  batch.count = 0;
}

/// The shape of a tile is a matter of speed, not of bits.
template <typename Launch>
void launch_matrix(const Launch& launch, LinearBatch& batch, int64_t max_tokens) {
  if (max_tokens <= LinearStream16::kTileTokens) {
    launch_batch<LinearStream16>(launch, batch);
  } else if (max_tokens <= LinearStream64::kTileTokens) {
    launch_batch<LinearStream64>(launch, batch);
  } else {
    launch_batch<LinearTile128x64>(launch, batch);
  }
}

/// Products of a call, gathered until a launch is full.
template <typename Launch>
class LinearCall {
 public:
  LinearCall(const LinearParams& params, const OpContext& context)
      : params_(params), launch_(context) {
    for (const LinearProblem& problem : params.problems) {
      if (problem.x.dtype == DType::kBf16)
        budget_ = std::max(budget_, prepared_bytes(problem.x.shape[0], problem.w.cols));
    }
    base_ = context.scratch->take(budget_);
  }

  void add(const LinearProblem& problem) {
    if (problem.x.shape[0] == 0 || problem.w.rows == 0) return;
    check_linear_problem(problem, params_.quantise_input);
    DSV4_CHECK(problem.w.rows < INT32_MAX && problem.w.cols < INT32_MAX / 4 &&
               problem.x.shape[0] < INT32_MAX);
    ConstTensor x = problem.x;
    DSV4_CHECK(x.shape[0] * x.strides[0] < UINT32_MAX / 4);
    const bool matrix = x.dtype == DType::kBf16 && matrix_takes(problem.w);
    if (params_.quantise_input ||
        (matrix && !rows_aligned(x.data, x.strides[0] * size_of(x.dtype), kXAlignment)))
      x = prepared(x);
    LinearBatch& batch = matrix ? matrix_ : any_;
    if (batch.count == kMaxLinearItems) flush();
    batch.items[batch.count++] = {.w = weight_view(problem.w),
                                  .x = x.data,
                                  .x_stride = x.strides[0],
                                  .out = problem.out.data,
                                  .out_stride = problem.out.strides[0],
                                  .tokens = static_cast<int32_t>(x.shape[0]),
                                  .first_tile = 0,
                                  .x_f32 = x.dtype == DType::kF32,
                                  .out_f32 = problem.out.dtype == DType::kF32};
    if (matrix) max_tokens_ = std::max(max_tokens_, x.shape[0]);
  }

  void flush() {
    launch_matrix(launch_, matrix_, max_tokens_);
    launch_batch<LinearAny>(launch_, any_);
    max_tokens_ = 0;
  }

 private:
  // Neighbours with the same x share its copy. The memory is used again when it is full: launches
  // end in their order.
  ConstTensor prepared(const ConstTensor& x) {
    if (last_x_ && last_x_.data == x.data && last_x_.shape == x.shape &&
        last_x_.strides == x.strides)
      return last_prepared_;
    const int64_t bytes = prepared_bytes(x.shape[0], x.shape[1]);
    if (used_ + bytes > budget_) {
      flush();
      used_ = 0;
    }
    Tensor out(base_ + used_, DType::kBf16, {x.shape[0], x.shape[1]});
    out.strides[0] = round_up(x.shape[1], kPieceCols);
    used_ += bytes;
    launch_prepare(launch_, x, out, params_.quantise_input);
    last_x_ = x;
    last_prepared_ = out;
    return last_prepared_;
  }

  const LinearParams& params_;
  Launch launch_;
  std::byte* base_ = nullptr;
  int64_t budget_ = 0, used_ = 0, max_tokens_ = 0;
  ConstTensor last_x_{}, last_prepared_{};
  LinearBatch matrix_{}, any_{};
};

template <typename Launch>
void linear(const LinearParams& params, const OpContext& context) {
  const Arena::Scope scope(*context.scratch);
  LinearCall<Launch> call(params, context);
  if (context.scratch->measuring()) return;
  for (const LinearProblem& problem : params.problems) call.add(problem);
  call.flush();
}

inline int64_t linear_scratch_bytes(const ScratchLimits& limits) {
  return prepared_bytes(limits.max_tokens, limits.max_cols);
}

template <typename Launch>
void install_linear(Ops& ops) {
  ops.linear = linear<Launch>;
}

}  // namespace dsv4::amd
