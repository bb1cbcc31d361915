// moe over the kernels of moe.h: buffers, tiles, launches. The launcher is that of
// gpu/rowwise_ops.h.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "backends/amd/ops/linear_ops.h"
#include "backends/amd/ops/moe.h"

namespace dsv4::amd {

constexpr int64_t kMoeTokensAtOnce = 2048;  // bounds scratch; more tokens go in turns

// Scratch of a call. Row v of the buffers is sorted visit v; rows of the shared expert follow.
struct MoeBuffers {
  static constexpr int kMatrices = 3;  // w1, w3, w2
  int64_t tokens, rows;
  gpu::Bf16* x;            // [tokens, n] prepared input
  float* up;               // [2][rows, inter]: w1 x and w3 x; later y [rows, n] of w2
  gpu::Bf16* a;            // [rows, inter]
  int32_t* visit_of;       // [rows]
  int32_t* token_of;       // [rows]
  int32_t* row_of;         // [tokens * k]
  TokenTile* tiles;        // [max_tiles]
  int32_t* num_tiles;      // [1]
  ExpertMatrix* matrices;  // [kMatrices][experts + 1]

  MoeBuffers(Arena& arena, int64_t step_tokens, int64_t k, int64_t experts, int64_t n,
             int64_t inter)
      : tokens(std::min(step_tokens, kMoeTokensAtOnce)),
        rows(tokens * (k + 1)),
        x(arena.take_array<gpu::Bf16>(tokens * n)),
        up(arena.take_array<float>(rows * std::max(2 * inter, n))),
        a(arena.take_array<gpu::Bf16>(rows * inter)),
        visit_of(arena.take_array<int32_t>(rows)),
        token_of(arena.take_array<int32_t>(rows)),
        row_of(arena.take_array<int32_t>(tokens * k)),
        tiles(arena.take_array<TokenTile>(max_tiles(tokens, k, experts, MoeStream16::kTileTokens))),
        num_tiles(arena.take_array<int32_t>(1)),
        matrices(arena.take_array<ExpertMatrix>(kMatrices * (experts + 1))) {}

  // Every visited expert has one tile that is not full at most.
  static int64_t max_tiles(int64_t tokens, int64_t k, int64_t experts, int64_t tile_tokens) {
    return std::min(tokens * k, experts) + tokens * k / tile_tokens + ceil_div(tokens, tile_tokens);
  }
};

template <typename Launch>
class MoeCall {
 public:
  MoeCall(const MoeParams& params, const MoeBuffers& buffers, const Launch& launch)
      : params_(params),
        buffers_(buffers),
        launch_(launch),
        experts_(static_cast<int64_t>(params.experts.size())),
        k_(experts_ == 0 ? 0 : params.expert_ids.shape[1]),
        n_(params.x.shape[1]),
        inter_((experts_ == 0 ? params.shared : params.experts[0]).w1.rows) {
    up_ = products({&ExpertWeights::w1, &ExpertWeights::w3}, buffers.matrices);
    down_ = products({&ExpertWeights::w2}, buffers.matrices + 2 * (experts_ + 1));
  }

  void run(int64_t first, int64_t tokens) {
    const int64_t visits = tokens * k_;
    const bool shared = static_cast<bool>(params_.shared.w1);
    const int64_t rows = visits + (shared ? tokens : 0);
    int64_t tile_tokens = 0;
    with_shape(tokens, [&](auto shape) { tile_tokens = decltype(shape)::type::kTileTokens; });
    launch_.template run<MoeSort>(
        1, {.expert_ids = experts_ == 0
                              ? nullptr
                              : params_.expert_ids.rows(first, tokens).template as<int32_t>(),
            .ids_stride = params_.expert_ids.strides[0],
            .tokens = static_cast<int32_t>(tokens),
            .k = static_cast<int32_t>(k_),
            .experts = static_cast<int32_t>(experts_),
            .tile_tokens = static_cast<int32_t>(tile_tokens),
            .shared = shared,
            .visit_of = buffers_.visit_of,
            .token_of = buffers_.token_of,
            .row_of = buffers_.row_of,
            .tiles = buffers_.tiles,
            .num_tiles = buffers_.num_tiles});
    launch_prepare(launch_, params_.x.rows(first, tokens),
                   Tensor(buffers_.x, DType::kBf16, {tokens, n_}), params_.quantise_input);
    up_.x = reinterpret_cast<const uint16_t*>(buffers_.x);
    up_.x_stride = n_;
    up_.x_rows = buffers_.token_of;
    multiply(up_, tokens, rows);

    const ConstTensor weights =
        experts_ == 0 ? ConstTensor() : params_.expert_weights.rows(first, tokens);
    launch_.template run<MoeSwiglu>(
        ceil_div(rows * ceil_div(inter_, int64_t{kQuantiseCols}), int64_t{MoeSwiglu::kGroups}),
        {.up = buffers_.up,
         .rows = rows,
         .inter = static_cast<int32_t>(inter_),
         .k = static_cast<int32_t>(k_),
         .visit_of = buffers_.visit_of,
         .expert_weights = weights.as<float>(),
         .weights_stride = weights.strides[0],
         .limit = params_.swiglu_limit,
         .quantise = params_.quantise_input,
         .a = buffers_.a});

    down_.x = reinterpret_cast<const uint16_t*>(buffers_.a);
    down_.x_stride = inter_;
    down_.x_rows = nullptr;
    multiply(down_, tokens, rows);
    const Tensor out = params_.out.rows(first, tokens);
    const int64_t parts = std::min<int64_t>(4, ceil_div(n_, int64_t{MoeCombine::kThreads}));
    launch_.template run<MoeCombine>(tokens * parts, {.y = buffers_.up,
                                                      .row_of = buffers_.row_of,
                                                      .tokens = static_cast<int32_t>(tokens),
                                                      .k = static_cast<int32_t>(k_),
                                                      .n = static_cast<int32_t>(n_),
                                                      .shared = shared,
                                                      .out = out.as<gpu::Bf16>(),
                                                      .out_stride = out.strides[0],
                                                      .parts = static_cast<int32_t>(parts)});
  }

 private:
  const ExpertWeights& expert(int64_t e) const {
    return e < experts_ ? params_.experts[static_cast<size_t>(e)] : params_.shared;
  }

  // w1 and w3, or w2, of all experts. Those of a kind differ only in where they are.
  MoeProductsArgs products(std::initializer_list<Weight ExpertWeights::*> which,
                           ExpertMatrix* matrices) const {
    MoeProductsArgs out{};
    out.matrices = matrices;
    out.num_matrices = static_cast<int32_t>(which.size());
    out.experts = static_cast<int32_t>(experts_);
    out.tiles = buffers_.tiles;
    out.num_tiles = buffers_.num_tiles;
    for (Weight ExpertWeights::*matrix : which) {
      MoePointersArgs args{};
      args.to = matrices;
      for (int64_t e = 0; e <= experts_; ++e) {
        args.from[args.count++] = place(expert(e).*matrix, out.kinds[e == experts_ ? 1 : 0]);
        if (args.count < MoePointersArgs::kCount && e < experts_) continue;
        launch_.template run<MoePointers>(1, args);
        args.to += args.count;
        args.count = 0;
      }
      matrices = args.to;
    }
    if (experts_ == 0) out.kinds[0] = out.kinds[1];
    if (!params_.shared.w1) out.kinds[1] = out.kinds[0];
    DSV4_CHECK(out.kinds[0].rows == out.kinds[1].rows && out.kinds[0].cols == out.kinds[1].cols);
    return out;
  }

  // `kind` becomes the first matrix of its kind.
  static ExpertMatrix place(const Weight& weight, WeightView& kind) {
    if (!weight) return {};  // no shared expert
    DSV4_CHECK(matrix_takes(weight));
    const WeightView w = weight_view(weight);
    if (kind.data == nullptr) kind = w;
    DSV4_CHECK(w.dtype == kind.dtype && w.rows == kind.rows && w.cols == kind.cols &&
               w.row_bytes == kind.row_bytes && w.scale_stride == kind.scale_stride &&
               w.block_rows == kind.block_rows && w.block_cols == kind.block_cols);
    kind.scale_words = kind.scale_words && w.scale_words;
    const auto from = [](const uint8_t* first, const uint8_t* here) {
      return static_cast<int64_t>(reinterpret_cast<uintptr_t>(here) -
                                  reinterpret_cast<uintptr_t>(first));
    };
    return {from(kind.data, w.data), from(kind.scale, w.scale)};
  }

  // The shape of a tile, by what an expert gets on average: a matter of speed, not of bits.
  template <typename F>
  void with_shape(int64_t tokens, F f) const {
    const int64_t average = experts_ == 0 ? tokens : tokens * k_ / experts_;
    if (average <= MoeStream16::kTileTokens) {
      f(std::type_identity<MoeStream16>{});
    } else if (average <= MoeStream64::kTileTokens) {
      f(std::type_identity<MoeStream64>{});
    } else {
      f(std::type_identity<MoeTile128x64>{});
    }
  }

  void multiply(MoeProductsArgs& args, int64_t tokens, int64_t rows) const {
    args.out = buffers_.up;
    args.out_rows = rows;
    with_shape(tokens, [&](auto shape) {
      using Kernel = typename decltype(shape)::type;
      launch<Kernel>(args, MoeBuffers::max_tiles(tokens, k_, experts_, Kernel::kTileTokens));
    });
  }
  template <typename Kernel>
  void launch(const MoeProductsArgs& args, int64_t tiles) const {
    const int64_t blocks = tiles * args.num_matrices *
                           ceil_div(int64_t{args.kinds[0].rows}, int64_t{Kernel::kTileRows});
    DSV4_CHECK(blocks < INT32_MAX);
    launch_.template run<Kernel>(blocks, args);
  }

  const MoeParams& params_;
  const MoeBuffers& buffers_;
  const Launch& launch_;
  int64_t experts_, k_, n_, inter_;
  MoeProductsArgs up_{}, down_{};
};

template <typename Launch>
void moe(const MoeParams& params, const OpContext& context) {
  const int64_t tokens = params.x.shape[0];
  if (tokens == 0) return;
  const auto experts = static_cast<int64_t>(params.experts.size());
  const int64_t inter = (experts == 0 ? params.shared : params.experts[0]).w1.rows;
  const int64_t k = experts == 0 ? 0 : params.expert_ids.shape[1];
  const Arena::Scope scope(*context.scratch);
  const MoeBuffers buffers(*context.scratch, tokens, k, experts, params.x.shape[1], inter);
  if (context.scratch->measuring()) return;
  DSV4_CHECK(params.x.dtype == DType::kBf16 && params.out.dtype == DType::kBf16);
  DSV4_CHECK(experts <= kMaxExperts);
  const Launch launch(context);
  MoeCall<Launch> call(params, buffers, launch);
  for (int64_t first = 0; first < tokens; first += buffers.tokens)
    call.run(first, std::min(buffers.tokens, tokens - first));
}

inline int64_t moe_scratch_bytes(const ScratchLimits& limits) {
  if (limits.moe_intermediate == 0 || limits.max_tokens == 0) return 0;
  Arena measure;
  const MoeBuffers buffers(measure, limits.max_tokens, limits.experts_per_token, limits.num_experts,
                           limits.hidden_size, limits.moe_intermediate);
  return measure.peak();
}

template <typename Launch>
void install_moe(Ops& ops) {
  ops.moe = moe<Launch>;
}

}  // namespace dsv4::amd
