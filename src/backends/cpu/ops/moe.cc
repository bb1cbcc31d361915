// Mixture of experts (model.md 4.2). Tokens are grouped by expert, and experts are worked through
// in groups of rows in ascending id, the shared expert first: adding a group's outputs to the
// tokens' f32 sums in row order is then the canonical order, whatever the sizes of tiles and
// groups.
#include <cstring>
#include <utility>

#include "backends/cpu/candidates.h"
#include "backends/cpu/ops/rowwise.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

// Bounds of scratch. A tile of tokens owns f32 sums; a group of rows owns the intermediates.
constexpr int64_t kTileTokens = 2048;
constexpr int64_t kGroupRows = 256;
constexpr int64_t kGroupExperts = 128;
// Columns that one thread adds up: whole cache lines of every row, rows in order.
constexpr int64_t kSpanCols = 1024;

// A token's visit to an expert.
struct Visit {
  int32_t token;  // within the tile
  float weight;
};

// Consecutive rows of a group that go to one expert.
struct Segment {
  const ExpertWeights* expert;
  int64_t begin, count;
};

// Scratch of a call, taken in one place so that the bound below cannot forget a part.
struct MoeBuffers {
  int64_t tile_tokens, group_rows;
  float* sums;              // [tile, n]
  Visit* visits;            // [tile * k] by expert, then token
  int64_t* expert_begin;    // [experts + 1]
  Visit* rows;              // [group]
  Segment* segments;        // [kGroupExperts]
  LinearProblem* problems;  // [2 * kGroupExperts]
  Tensor x;                 // [group, n] act
  Tensor g, u;              // [group, inter] f32
  Tensor a;                 // [group, inter] act
  Tensor y;                 // [group, n] f32

  MoeBuffers(Arena& arena, DType act, int64_t tokens, int64_t k, int64_t experts, int64_t n,
             int64_t inter)
      : tile_tokens(std::min(tokens, kTileTokens)),
        group_rows(std::min(tokens * (k + 1), kGroupRows)),
        sums(arena.take_array<float>(tile_tokens * n)),
        visits(arena.take_array<Visit>(tile_tokens * k)),
        expert_begin(arena.take_array<int64_t>(experts + 1)),
        rows(arena.take_array<Visit>(group_rows)),
        segments(arena.take_array<Segment>(kGroupExperts)),
        problems(arena.take_array<LinearProblem>(2 * kGroupExperts)),
        x(arena.take_tensor(act, {group_rows, n})),
        g(arena.take_tensor(DType::kF32, {group_rows, inter})),
        u(arena.take_tensor(DType::kF32, {group_rows, inter})),
        a(arena.take_tensor(act, {group_rows, inter})),
        y(arena.take_tensor(DType::kF32, {group_rows, n})) {}
};

// Stable counting sort of the tile's visits by expert.
void sort_visits(const MoeParams& params, int64_t first, int64_t tokens,
                 const MoeBuffers& buffers) {
  const auto experts = static_cast<int64_t>(params.experts.size());
  const int64_t k = params.expert_ids.shape[1];
  int64_t* begin = buffers.expert_begin;
  std::fill_n(begin, experts + 1, 0);
  const auto ids = [&](int64_t t) {
    return static_cast<const int32_t*>(row_at(params.expert_ids, first + t));
  };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      DSV4_CHECK(ids(t)[i] >= 0 && ids(t)[i] < experts);
      ++begin[ids(t)[i]];
    }
  }
  int64_t end = 0;
  for (int64_t e = 0; e <= experts; ++e) end += std::exchange(begin[e], end);
  for (int64_t t = 0; t < tokens; ++t) {
    const auto* weights = static_cast<const float*>(row_at(params.expert_weights, first + t));
    for (int64_t i = 0; i < k; ++i)
      buffers.visits[begin[ids(t)[i]]++] = {static_cast<int32_t>(t), weights[i]};
  }
  // begin[e] has advanced to the end of e, which is the begin of e + 1.
  for (int64_t e = experts; e > 0; --e) begin[e] = begin[e - 1];
  begin[0] = 0;
}

class MoeTile {
 public:
  MoeTile(const MoeParams& params, const OpContext& context, const MoeBuffers& buffers,
          int64_t first, int64_t tokens)
      : params_(params), context_(context), buffers_(buffers), first_(first), tokens_(tokens) {}

  void run() {
    const int64_t n = params_.x.shape[1];
    parallel_chunks(context_.stream, tokens_, 16, [&](int64_t begin, int64_t end, int) {
      std::memset(buffers_.sums + begin * n, 0,
                  static_cast<size_t>((end - begin) * n) * sizeof(float));
    });
    if (params_.shared.w1) {
      for (int64_t t = 0; t < tokens_; ++t) push(params_.shared, {static_cast<int32_t>(t), 1.0f});
    }
    if (!params_.experts.empty()) {
      sort_visits(params_, first_, tokens_, buffers_);
      for (size_t e = 0; e < params_.experts.size(); ++e) {
        for (int64_t i = buffers_.expert_begin[e]; i < buffers_.expert_begin[e + 1]; ++i)
          push(params_.experts[e], buffers_.visits[i]);
      }
    }
    flush();
    parallel_chunks(context_.stream, tokens_, 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        kernels_.convert(buffers_.sums + t * n, DType::kF32, n, row_at(params_.out, first_ + t),
                         params_.out.dtype);
      }
    });
  }

 private:
  // Appends a row to the group; a full group is computed first.
  void push(const ExpertWeights& expert, Visit visit) {
    const bool same = num_segments_ > 0 && buffers_.segments[num_segments_ - 1].expert == &expert;
    if (num_rows_ == buffers_.group_rows || (!same && num_segments_ == kGroupExperts)) flush();
    if (num_segments_ == 0 || buffers_.segments[num_segments_ - 1].expert != &expert)
      buffers_.segments[num_segments_++] = {&expert, num_rows_, 0};
    ++buffers_.segments[num_segments_ - 1].count;
    buffers_.rows[num_rows_++] = visit;
  }

  // Input of a segment: in place where its tokens are consecutive (the shared expert, a single
  // token: all problems then share one x and its quantisation), gathered otherwise.
  ConstTensor input(const Segment& segment) const {
    const Visit* rows = buffers_.rows + segment.begin;
    if (rows[segment.count - 1].token - rows[0].token == segment.count - 1)
      return params_.x.rows(first_ + rows[0].token, segment.count);
    return buffers_.x.rows(segment.begin, segment.count);
  }

  void gather() const {
    const auto row_bytes = static_cast<size_t>(params_.x.shape[1] * size_of(params_.x.dtype));
    parallel_chunks(context_.stream, num_segments_, 1, [&](int64_t s, int64_t, int) {
      const Segment& segment = buffers_.segments[s];
      if (input(segment).data != row_at(buffers_.x, segment.begin)) return;
      for (int64_t r = segment.begin; r < segment.begin + segment.count; ++r) {
        std::memcpy(row_at(buffers_.x, r), row_at(params_.x, first_ + buffers_.rows[r].token),
                    row_bytes);
      }
    });
  }

  void linear(int64_t count) const {
    context_.ops->linear({.problems = {buffers_.problems, static_cast<size_t>(count)},
                          .quantise_input = params_.quantise_input},
                         context_);
  }

  void flush() {
    if (num_rows_ == 0) return;
    gather();
    for (int64_t s = 0; s < num_segments_; ++s) {
      const Segment& segment = buffers_.segments[s];
      const ConstTensor x = input(segment);
      buffers_.problems[2 * s] = {x, segment.expert->w1,
                                  buffers_.g.rows(segment.begin, segment.count)};
      buffers_.problems[2 * s + 1] = {x, segment.expert->w3,
                                      buffers_.u.rows(segment.begin, segment.count)};
    }
    linear(2 * num_segments_);

    const int64_t inter = buffers_.g.shape[1], n = params_.x.shape[1];
    parallel_chunks(context_.stream, num_rows_, 1, [&](int64_t r, int64_t, int) {
      kernels_.swiglu(buffers_.g.as<float>() + r * inter, buffers_.u.as<float>() + r * inter,
                      params_.swiglu_limit, buffers_.rows[r].weight, inter, row_at(buffers_.a, r),
                      buffers_.a.dtype);
    });
    for (int64_t s = 0; s < num_segments_; ++s) {
      const Segment& segment = buffers_.segments[s];
      buffers_.problems[s] = {buffers_.a.rows(segment.begin, segment.count), segment.expert->w2,
                              buffers_.y.rows(segment.begin, segment.count)};
    }
    linear(num_segments_);

    parallel_chunks(context_.stream, n, kSpanCols, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = 0; r < num_rows_; ++r) {
        kernels_.add(buffers_.y.as<float>() + r * n + begin, end - begin,
                     buffers_.sums + buffers_.rows[r].token * n + begin);
      }
    });
    num_rows_ = num_segments_ = 0;
  }

  const MoeParams& params_;
  const OpContext& context_;
  const MoeBuffers& buffers_;
  const RowKernels& kernels_ = best_row_kernels();
  int64_t first_, tokens_;
  int64_t num_rows_ = 0, num_segments_ = 0;
};

int64_t intermediate_size(const MoeParams& params) {
  return params.experts.empty() ? params.shared.w1.rows : params.experts[0].w1.rows;
}

}  // namespace

void moe(const MoeParams& params, const OpContext& context) {
  const int64_t tokens = params.x.shape[0];
  if (tokens == 0) return;
  Arena::Scope scope(*context.scratch);
  const MoeBuffers buffers(*context.scratch, params.x.dtype, tokens,
                           params.experts.empty() ? 0 : params.expert_ids.shape[1],
                           static_cast<int64_t>(params.experts.size()), params.x.shape[1],
                           intermediate_size(params));
  for (int64_t first = 0; first < tokens; first += buffers.tile_tokens)
    MoeTile(params, context, buffers, first, std::min(buffers.tile_tokens, tokens - first)).run();
}

int64_t moe_scratch_bytes(const ScratchLimits& limits) {
  if (limits.moe_intermediate == 0 || limits.max_tokens == 0) return 0;
  Arena measure;
  const MoeBuffers buffers(measure, DType::kF32, limits.max_tokens, limits.experts_per_token,
                           limits.num_experts, limits.hidden_size, limits.moe_intermediate);
  // The linear operations run beside these. Their own bound counts max_tokens rows a problem, and
  // the group's problems hold up to (k + 1) * max_tokens rows in all.
  ScratchLimits inner = limits;
  inner.max_tokens = std::max(limits.max_tokens, buffers.group_rows);
  return measure.peak() + linear_scratch_bytes(inner);
}

}  // namespace dsv4::cpu
