// The part of a dense product that all kernels share: which kernel takes a problem, which problems
// share a prepared x and a launch.
#include "backends/nvidia/ops/linear.h"

#include <algorithm>
#include <bit>

#include "backends/gpu/numbers.h"
#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90.h"
#include "backends/nvidia/ops/linear_sm90_fp8.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "ops/linear_problem.h"

namespace dsv4::nvidia {
namespace {

constexpr int64_t kSplitRows = 256;   // of f32 x at a time, which bounds scratch
constexpr int64_t kPanelsCols = 128;  // of x, that panels hold: where a part of x may begin
constexpr int64_t kAlignment = 16;    // of a piece that the tensor-core kernels copy

bool aligned(const void* data, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row_bytes)) % kAlignment == 0;
}

int64_t prepared_bytes(int64_t rows, int64_t cols) {
  return round_up(rows * round_up(cols, 128) * int64_t{sizeof(uint16_t)}, Arena::kAlignment);
}

// Three planes.
int64_t split_bytes(int64_t rows, int64_t cols) {
  return 3 * prepared_bytes(std::min(rows, kSplitRows), cols);
}

// The kernels count rows and columns in 32 bits.
void check(const LinearProblem& problem, bool quantise_input) {
  check_linear_problem(problem, quantise_input);
  DSV4_CHECK(problem.w.rows < INT32_MAX && problem.w.cols < INT32_MAX / 4 &&
             problem.x.shape[0] < INT32_MAX);
}

bool same_view(const ConstTensor& a, const ConstTensor& b) {
  return a.data == b.data && a.dtype == b.dtype && a.shape == b.shape && a.strides == b.strides;
}

// Panels of an x for the products of sm_90, with whole tiles of tokens.
int64_t panel_rows(int64_t rows) {
  return round_up(rows, sm90_tile_tokens(rows));
}
int64_t panels_bytes(int64_t rows, int64_t cols) {
  return panel_rows(rows) * round_up(cols, 128) * int64_t{sizeof(uint16_t)};
}

// Codes of an x for the FP8 products, then its scales, for whole tiles of tokens.
int64_t codes_bytes(int64_t rows, int64_t cols) {
  return round_up(rows * round_up(cols, kFp8BlockCols), Arena::kAlignment);
}
int64_t fp8_bytes(int64_t rows, int64_t cols) {
  return codes_bytes(rows, cols) +
         round_up(row_scale_stride(rows) * ceil_div(cols, kFp8BlockCols) * int64_t{sizeof(float)},
                  Arena::kAlignment);
}

// Columns of x, elements from the first of `whole` to those of `part`; -1: not columns of it.
int64_t column_of(const ConstTensor& whole, const ConstTensor& part) {
  if (whole.dtype != part.dtype || whole.shape[0] != part.shape[0] ||
      whole.strides[0] != part.strides[0])
    return -1;
  const int64_t offset = part.as<uint16_t>() - whole.as<uint16_t>();
  return offset >= 0 && offset + part.shape[1] <= whole.shape[1] ? offset : -1;
}

// Fewer tokens stream (linear_stream.cu), with the same bits. call_codes: of all FP8 weights of the
// call. Beside other operations few blocks walk over the tiles; those that stream fill the device.
int64_t fewest_sm90_tokens(const Weight& weight, int64_t call_codes, bool is_beside) {
  if (weight.dtype != DType::kF8E4M3) return kMaxStreamTokens + 1;
  // Measured (docs/kernels/linear_nvidia.md): boxes of the copy engine bring many codes sooner,
  // lanes few.
  constexpr int64_t kMany = int64_t{1} << 26;
  if (is_beside || call_codes >= kMany) return 1;
  return 2 * weight.rows * weight.cols >= kMany ? 5 : 9;
}

// Of the device, for a selection beside the call. Measured (docs/kernels/layer_step_nvidia.md): few
// tokens are done before many scores.
int percent_for_others(int64_t scores_beside, int64_t tokens) {
  if (scores_beside == 0) return 0;
  return tokens <= 16 && scores_beside >= 32768 ? 50 : 33;
}

// May the blocks of an FP8 product do what its `input` says? For few tokens: every block does all
// of it.
bool makes_input(const LinearProblem& problem) {
  const ConstTensor& x = problem.x;
  const int64_t tokens = x.shape[0], cols = x.shape[1];
  if (problem.w.dtype != DType::kF8E4M3 || !sm90_takes(problem.w) || x.dtype != DType::kBf16 ||
      tokens > kFp8MadeTokens || cols > kFp8MadeCols || cols % kFp8MadeUnitCols != 0 ||
      cols < kFp8MadeLeastUnits * kFp8MadeUnitCols ||
      !aligned(x.data, x.strides[0] * size_of(x.dtype)))
    return false;
  if (const auto* normed = std::get_if<NormedInput>(&problem.input)) {
    return normed->weight.dtype == DType::kBf16 && aligned(normed->weight.data, 0) &&
           (tokens + 1) * cols <= kFp8MadeValues;
  }
  const auto* rotated = std::get_if<RotatedInput>(&problem.input);
  return rotated != nullptr && rotated->rope.rope_dim == 64 && tokens * cols <= kFp8MadeValues &&
         rotated->head_dim % kFp8MadeUnitCols == 0 &&
         std::has_single_bit(static_cast<uint32_t>(rotated->head_dim)) &&
         cols % rotated->head_dim == 0;
}
Fp8Maker maker_of(const LinearProblem& problem) {
  if (const auto* normed = std::get_if<NormedInput>(&problem.input)) {
    return {.kind = Fp8Maker::Kind::kNormed,
            .weight = normed->weight.data,
            .eps = normed->eps,
            .floor = gpu::kFp8AmaxFloor};
  }
  const auto& rotated = std::get<RotatedInput>(problem.input);
  return {.kind = Fp8Maker::Kind::kRotated,
          .floor = gpu::kInverseRopeAmaxFloor,
          .frequencies = rotated.rope.frequencies,
          .positions = rotated.positions,
          .head_dim = rotated.head_dim};
}

// Products of a call, gathered until a launch is full.
class Launches {
 public:
  Launches(const LinearParams& params, const OpContext& context, LinearKernels kernels)
      : params_(params), context_(context), kernels_(kernels) {
    int64_t most_rows = 0;
    for (const LinearProblem& problem : params.problems) {
      most_rows = std::max(most_rows, problem.x.shape[0]);
      if (problem.w.dtype == DType::kF8E4M3) call_codes_ += problem.w.rows * problem.w.cols;
    }
    for (size_t i = 0; i < params.problems.size(); ++i) {
      const LinearProblem& problem = params.problems[i];
      const int64_t rows = problem.x.shape[0];
      if (takes_split(problem)) budget_ = std::max(budget_, split_bytes(rows, problem.w.cols));
      if (problem.x.dtype != DType::kBf16) continue;
      budget_ = std::max(budget_, prepared_bytes(rows, problem.w.cols));
      const int64_t whole_cols = whole_x(i).shape[1];
      if (takes_fp8(problem)) budget_ = std::max(budget_, fp8_bytes(rows, whole_cols));
      if (takes_sm90(problem)) budget_ = std::max(budget_, panels_bytes(rows, whole_cols));
    }
    base_ = context.scratch->take(budget_);
    // Sums in f32 of many tokens want all of the device.
    const int all = num_multiprocessors();
    const int most = all * (100 - percent_for_others(params.scores_beside, most_rows)) / 100;
    codes_batch_.most_blocks = most;
    fp8_.most_blocks = most_rows <= kMaxStreamTokens ? most : all;
    bf16_.most_blocks = all;
  }

  void add(size_t idx) {
    const LinearProblem& problem = params_.problems[idx];
    if (problem.x.shape[0] == 0 || problem.w.rows == 0) return;
    if (problem.x.dtype == DType::kF8E4M3) return add_codes(problem);
    if (problem.input.index() != 0) return add_made(problem);
    check(problem, params_.quantise_input);
    if (takes_fp8(problem)) return add_fp8(idx);
    if (takes_sm90(problem)) return add_sm90(idx);
    if (takes_split(problem)) return add_split(problem);
    ConstTensor x = problem.x;
    const bool fast = kernels_ != LinearKernels::kReference && x.dtype == DType::kBf16 &&
                      tensor_cores_take(problem.w);
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
    launch_linear_sm90_fp8(codes_batch_, stream);
    launch_linear_sm90(DType::kF8E4M3, fp8_, stream);
    launch_linear_sm90(DType::kBf16, bf16_, stream);
    launch_linear_fast(fast_, max_tokens_, stream);
    launch_linear_split(split_, stream);
    launch_linear_reference(slow_, stream);
    codes_batch_.count = split_.count = fp8_.count = bf16_.count = fast_.count = slow_.count = 0;
    max_tokens_ = 0;
  }

 private:
  // A property of the call and the weight, never of the number of tokens.
  bool takes_fp8(const LinearProblem& problem) const {
    return (kernels_ == LinearKernels::kSm90Fp8 ||
            (kernels_ == LinearKernels::kSm90 && params_.products == Products::kFp8)) &&
           (params_.quantise_input || params_.quantised_input) && problem.x.dtype == DType::kBf16 &&
           problem.w.dtype == DType::kF8E4M3 && sm90_takes(problem.w);
  }

  bool takes_sm90(const LinearProblem& problem) const {
    return kernels_ >= LinearKernels::kSm90 && problem.x.dtype == DType::kBf16 &&
           problem.x.shape[0] >=
               fewest_sm90_tokens(problem.w, call_codes_, params_.scores_beside > 0) &&
           sm90_takes(problem.w);
  }

  bool takes_split(const LinearProblem& problem) const {
    return kernels_ != LinearKernels::kReference && problem.x.dtype == DType::kF32 &&
           problem.w.dtype == DType::kBf16 && tensor_cores_take(problem.w);
  }

  void add_split(const LinearProblem& problem) {
    for (int64_t row = 0; row < problem.x.shape[0]; row += kSplitRows) {
      if (split_.count == kMaxLinearItems) flush();
      const int64_t rows = std::min(kSplitRows, problem.x.shape[0] - row);
      const int64_t stride = round_up(problem.w.cols, 128);
      const ConstTensor x = problem.x.rows(row, rows);
      auto* data = reinterpret_cast<uint16_t*>(take(split_bytes(rows, problem.w.cols)));
      launch_linear_split_prepare({.x = x.as<float>(),
                                   .x_stride = x.strides[0],
                                   .out = data,
                                   .out_stride = stride,
                                   .plane_stride = rows * stride,
                                   .rows = static_cast<int32_t>(rows),
                                   .cols = static_cast<int32_t>(problem.w.cols)},
                                  stream_of(context_.stream));
      const Tensor out = problem.out.rows(row, rows);
      split_.items[split_.count++] = {.w = linear_weight(problem.w),
                                      .x = data,
                                      .x_stride = stride,
                                      .out = out.data,
                                      .out_stride = out.strides[0],
                                      .tokens = static_cast<int32_t>(rows),
                                      .first_tile = 0,
                                      .x_f32 = false,
                                      .out_f32 = out.dtype == DType::kF32,
                                      .x_plane_stride = rows * stride};
    }
  }

  // The x of problem `idx` and, where those of the next problems are the columns after it (the
  // groups of wo_a), all of them as one.
  ConstTensor whole_x(size_t idx) const {
    ConstTensor whole = params_.problems[idx].x;
    for (size_t i = idx + 1; i < params_.problems.size(); ++i) {
      ConstTensor wider = whole;
      wider.shape[1] += params_.problems[i].x.shape[1];
      if (whole.shape[1] % kPanelsCols != 0 || wider.shape[1] > wider.strides[0] ||
          column_of(wider, params_.problems[i].x) != whole.shape[1])
        break;
      whole = wider;
    }
    return whole;
  }

  // Room for a prepared x; later launches reuse the memory, the stream keeps their order.
  std::byte* take(int64_t bytes) {
    if (used_ + bytes > budget_) {
      flush();
      used_ = 0;
      last_x_ = panels_x_ = codes_x_ = {};
    }
    used_ += bytes;
    return base_ + used_ - bytes;
  }

  // Neighbours with the same x share its copy.
  ConstTensor prepared(const ConstTensor& x) {
    if (last_x_ && same_view(x, last_x_)) return last_prepared_;
    std::byte* data = take(prepared_bytes(x.shape[0], x.shape[1]));
    last_x_ = x;
    last_prepared_ = ConstTensor(data, DType::kBf16, {x.shape[0], x.shape[1]});
    last_prepared_.strides[0] = round_up(x.shape[1], 128);
    launch_linear_prepare({.x = x.as<uint16_t>(),
                           .x_stride = x.strides[0],
                           .out = reinterpret_cast<uint16_t*>(data),
                           .out_stride = last_prepared_.strides[0],
                           .rows = static_cast<int32_t>(x.shape[0]),
                           .cols = static_cast<int32_t>(x.shape[1]),
                           .quantise = params_.quantise_input},
                          stream_of(context_.stream));
    return last_prepared_;
  }

  void add_sm90(size_t idx) {
    const LinearProblem& problem = params_.problems[idx];
    const DType w = problem.w.dtype;
    Sm90Batch& batch = w == DType::kF8E4M3 ? fp8_ : bf16_;
    const auto tokens = static_cast<int32_t>(problem.x.shape[0]);
    // A launch has tiles of one size.
    if (batch.count == kMaxSm90Items ||
        (batch.count > 0 && sm90_tile_tokens(batch.items[0].tokens) != sm90_tile_tokens(tokens)))
      flush();
    int64_t col = panels_x_ && panels_.w == w ? column_of(panels_x_, problem.x) : -1;
    if (col < 0 || col % kPanelsCols != 0) {
      prepare_panels(whole_x(idx), w);
      col = 0;
    }
    Sm90Item& item = batch.items[batch.count++];
    item.w = linear_weight(problem.w);
    item.x = panels_.out + col * panels_.out_rows;
    item.x_rows = panels_.out_rows;
    item.out = problem.out.data;
    item.out_stride = problem.out.strides[0];
    item.tokens = tokens;
    item.out_f32 = problem.out.dtype == DType::kF32;
  }

  void prepare_panels(const ConstTensor& x, DType w) {
    const int64_t rows = x.shape[0], cols = x.shape[1];
    std::byte* data = take(panels_bytes(rows, cols));
    panels_x_ = x;
    panels_ = {.x = x.as<uint16_t>(),
               .x_stride = x.strides[0],
               .out = reinterpret_cast<uint16_t*>(data),
               .rows = static_cast<int32_t>(rows),
               .cols = static_cast<int32_t>(cols),
               .out_rows = static_cast<int32_t>(panel_rows(rows)),
               .w = w,
               .quantise = params_.quantise_input};
    launch_linear_sm90_prepare(panels_, stream_of(context_.stream));
  }

  void add_fp8(size_t idx) {
    const LinearProblem& problem = params_.problems[idx];
    int64_t col = codes_x_ ? column_of(codes_x_, problem.x) : -1;
    if (col < 0 || col % kFp8BlockCols != 0) {
      prepare_codes(whole_x(idx));
      col = 0;
    }
    add_codes(problem, codes_.codes + col, codes_.code_stride,
              {codes_.scale + col / kFp8BlockCols * codes_.scale_stride, codes_.scale_stride});
  }

  // Codes that an operation before has written.
  void add_codes(const LinearProblem& problem) {
    const ConstTensor& x = problem.x;
    DSV4_CHECK(kernels_ >= LinearKernels::kSm90 && problem.w.dtype == DType::kF8E4M3 &&
               sm90_takes(problem.w) && x.rank == 2 && x.shape[1] == problem.w.cols &&
               x.shape[0] == problem.out.shape[0] && problem.out.shape[1] == problem.w.rows &&
               x.strides[1] == 1 && x.shape[1] % kFp8BlockCols == 0 &&
               aligned(x.data, x.strides[0]) && aligned(problem.x_scale.data, 0) &&
               problem.x_scale.stride == row_scale_stride(x.shape[0]));
    check_codes_out(problem);
    add_codes(problem, x.data, x.strides[0], problem.x_scale);
  }

  // Values of which the product makes codes itself.
  void add_made(const LinearProblem& problem) {
    DSV4_CHECK(kernels_ >= LinearKernels::kSm90 && makes_input(problem));
    check_codes_out(problem);
    LinearProblem plain = problem;
    plain.input = {};
    if (plain.out.dtype == DType::kF8E4M3) plain.out.dtype = DType::kBf16;
    check(plain, true);
    add_codes(problem, problem.x.data, problem.x.strides[0], {}, maker_of(problem));
  }

  static void check_codes_out(const LinearProblem& problem) {
    DSV4_CHECK(problem.out.dtype != DType::kF8E4M3 ||
               (problem.out_scale.data != nullptr && problem.w.rows % kFp8BlockCols == 0 &&
                aligned(problem.out.data, problem.out.strides[0])));
  }

  void add_codes(const LinearProblem& problem, const void* x, int64_t stride,
                 const RowScales& scale, const Fp8Maker& maker = {}) {
    // A launch has tiles of one size, whose scales are read whole.
    const auto tokens = static_cast<int32_t>(problem.x.shape[0]);
    const auto differs = [&](const Fp8Item& other) {
      return other.tokens != tokens || other.maker.makes() != maker.makes();
    };
    if (codes_batch_.count == kMaxFp8Items ||
        (codes_batch_.count > 0 && differs(codes_batch_.items[0])))
      flush();
    Fp8Item& item = codes_batch_.items[codes_batch_.count++];
    item.w = linear_weight(problem.w);
    item.x = x;
    item.x_stride = stride;
    item.maker = maker;
    item.x_scale = scale.data;
    item.x_scale_stride = scale.stride;
    item.out = problem.out.data;
    item.out_stride = problem.out.strides[0];
    item.tokens = tokens;
    item.out_f32 = problem.out.dtype == DType::kF32;
    item.out_scale = problem.out.dtype == DType::kF8E4M3 ? problem.out_scale.data : nullptr;
    item.out_scale_stride = problem.out_scale.stride;
  }

  void prepare_codes(const ConstTensor& x) {
    const int64_t rows = x.shape[0], cols = x.shape[1];
    std::byte* data = take(fp8_bytes(rows, cols));
    codes_x_ = x;
    codes_ = {.x = x.as<uint16_t>(),
              .x_stride = x.strides[0],
              .codes = reinterpret_cast<uint8_t*>(data),
              .code_stride = round_up(cols, kFp8BlockCols),
              .scale = reinterpret_cast<float*>(data + codes_bytes(rows, cols)),
              .scale_stride = row_scale_stride(rows),
              .rows = static_cast<int32_t>(rows),
              .cols = static_cast<int32_t>(cols),
              .quantised = params_.quantised_input};
    launch_linear_sm90_fp8_prepare(codes_, stream_of(context_.stream));
  }

  const LinearParams& params_;
  const OpContext& context_;
  LinearKernels kernels_;
  std::byte* base_ = nullptr;
  int64_t budget_ = 0, used_ = 0;
  ConstTensor last_x_{}, last_prepared_{}, panels_x_{}, codes_x_{};
  Sm90PrepareParams panels_{};
  Fp8PrepareParams codes_{};
  LinearBatch fast_, split_, slow_;
  Sm90Batch fp8_, bf16_;
  Fp8Batch codes_batch_;
  int64_t call_codes_ = 0;  // of all FP8 weights
  int64_t max_tokens_ = 0;
};

template <LinearKernels kKernels>
void install(Ops& ops) {
  ops.takes_e4m3 = kKernels >= LinearKernels::kSm90;
  if (kKernels >= LinearKernels::kSm90) ops.makes_input = makes_input;
  ops.linear = [](const LinearParams& params, const OpContext& context) {
    run_linear(params, context, kKernels);
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

bool sm90_takes(const Weight& weight) {
  if (!tensor_cores_take(weight)) return false;
  return weight.dtype == DType::kBf16 || (weight.dtype == DType::kF8E4M3 &&
                                          weight.block_cols == 128 && weight.block_rows % 128 == 0);
}

void launch_linear_fast(LinearBatch& batch, int64_t max_tokens, cudaStream_t stream) {
  if (max_tokens <= kMaxStreamTokens) {
    launch_linear_stream(batch, max_tokens, stream);
  } else {
    launch_linear_tile(batch, max_tokens, stream);
  }
}

void run_linear(const LinearParams& params, const OpContext& context, LinearKernels kernels) {
  const Arena::Scope scope(*context.scratch);
  Launches launches(params, context, kernels);
  if (context.scratch->measuring()) return;
  for (size_t i = 0; i < params.problems.size(); ++i) launches.add(i);
  launches.flush();
}

std::span<const Candidate> linear_candidates() {
  static constexpr Candidate kCandidates[] = {
      {"linear", "sm90", needs_sm90, install<LinearKernels::kSm90>},
      {"linear", "sm90_fp8", needs_sm90, install<LinearKernels::kSm90Fp8>},
      {"linear", "sm80", needs_sm80, install<LinearKernels::kSm80>},
      {"linear", "reference", needs_sm80, install<LinearKernels::kReference>},
  };
  return kCandidates;
}

int64_t linear_scratch_bytes(const ScratchLimits& limits) {
  // The input of wo_a is prepared in one piece: all heads.
  const int64_t whole_cols = std::max(limits.max_cols, int64_t{limits.num_heads} * limits.head_dim);
  // A tile of tokens at most twice as many.
  const int64_t rows = round_up(limits.max_tokens, kSm90MaxTileTokens);
  return std::max({prepared_bytes(limits.max_tokens, limits.max_cols),
                   split_bytes(limits.max_tokens, limits.max_cols), panels_bytes(rows, whole_cols),
                   fp8_bytes(rows, whole_cols)});
}

}  // namespace dsv4::nvidia
