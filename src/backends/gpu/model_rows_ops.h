// The row-wise operations of the model around attention, over the kernels of model_rows*.h: which
// kernel, which grid. The launcher is that of rowwise_ops.h.
#pragma once
#include "backends/gpu/model_rows.h"
#include "backends/gpu/model_rows_hc.h"
#include "backends/gpu/rowwise_ops.h"

namespace dsv4::gpu {

/// Tokens whose partial products are in scratch memory at once.
constexpr int64_t kHcPassTokens = 1024;

inline int64_t model_rows_scratch_bytes(const ScratchLimits& limits) {
  const int64_t cols = std::max(limits.max_cols, kHcMaxStreams * limits.hidden_size);
  const int64_t sums = (2 + kHcMaxStreams) * kHcMaxStreams + 1;
  return std::min(limits.max_tokens, kHcPassTokens) * ceil_div(cols, int64_t{kHcChunkCols}) * sums *
             int64_t{sizeof(float)} +
         Arena::kAlignment;
}

/// Blocks of `threads` lanes with two elements each for a row, fewer where rows are many.
inline int32_t parts_of_row(int64_t rows, int64_t elems, int64_t threads) {
  const int64_t wanted = std::max<int64_t>(1, kFullGrid / std::max<int64_t>(1, rows));
  return static_cast<int32_t>(std::clamp<int64_t>(ceil_div(elems, 2 * threads), 1, wanted));
}

/// f(number of streams that the kernel is made for).
template <typename F>
void with_streams(int64_t hc, F f) {
  DSV4_CHECK(hc >= 1 && hc <= kHcMaxStreams);
  if (hc == 4) {
    f(std::integral_constant<int, 4>{});
  } else {
    f(std::integral_constant<int, kHcMaxStreams>{});
  }
}

template <typename Launch>
void embed(const EmbedParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const Tensor& streams = params.streams;
  const int64_t tokens = streams.shape[0];
  with_elems(params.table.dtype, [&](auto table) {
    with_act<Launch>(streams.dtype, [&](auto act) {
      using Kernel = Embed<decltype(table), decltype(act)>;
      const int32_t parts = parts_of_row(tokens, streams.shape[2], Kernel::kThreads);
      launch.template run<Kernel>(tokens * parts, {.ids = params.ids,
                                                   .table = params.table.data,
                                                   .table_stride = params.table.strides[0],
                                                   .streams = streams.data,
                                                   .token_stride = streams.strides[0],
                                                   .stream_stride = streams.strides[1],
                                                   .hc = static_cast<int32_t>(streams.shape[1]),
                                                   .width = static_cast<int32_t>(streams.shape[2]),
                                                   .parts = parts});
    });
  });
}

/// hc_pre and hc_head: products, then `finish` (without the fields of the streams) by passes.
template <typename Launch>
void hc_mix(const ConstTensor& streams, const HcWeights& weights, HcFinishArgs finish, Tensor y,
            const OpContext& context) {
  const int64_t tokens = streams.shape[0], hc = streams.shape[1], width = streams.shape[2];
  const int64_t cols = hc * width, chunks = ceil_div(cols, int64_t{kHcChunkCols});
  const int64_t rows = weights.fn.shape[0];
  DSV4_CHECK(streams.strides[1] == width);
  Arena::Scope scope(*context.scratch);
  float* partial =
      context.scratch->take_array<float>(std::min(tokens, kHcPassTokens) * chunks * (rows + 1));
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  with_act<Launch>(streams.dtype, [&](auto act) {
    using Act = decltype(act);
    with_streams(hc, [&](auto capacity) {
      for (int64_t first = 0; first < tokens; first += kHcPassTokens) {
        const int64_t count = std::min(tokens - first, kHcPassTokens);
        HcDotsArgs dots{.streams = streams.as<Act>() + first * streams.strides[0],
                        .token_stride = streams.strides[0],
                        .fn = weights.fn.as<float>(),
                        .fn_stride = weights.fn.strides[0],
                        .partial = partial,
                        .tokens = static_cast<int32_t>(count),
                        .cols = static_cast<int32_t>(cols),
                        .rows = static_cast<int32_t>(rows),
                        .chunks = static_cast<int32_t>(chunks),
                        .row_parts = 1};
        const auto run_dots = [&]<typename Kernel>(Kernel) {
          dots.row_parts = static_cast<int32_t>(ceil_div(rows, int64_t{Kernel::kBlockRows}));
          launch.template run<Kernel>(
              chunks * dots.row_parts * ceil_div(count, int64_t{Kernel::kTileTokens}), dots);
        };
        constexpr int64_t kFewTokens = 16;
        if (count <= kFewTokens) {
          run_dots(HcDots<Act, 2, 1>{});
        } else {
          run_dots(HcDots<Act, 6, 8>{});
        }
        using Finish = HcFinish<Act, decltype(capacity)::value>;
        HcFinishArgs args = finish;
        args.streams = dots.streams;
        args.token_stride = streams.strides[0];
        args.stream_stride = streams.strides[1];
        args.partial = partial;
        args.base = weights.base.as<float>();
        args.scale = weights.scale.as<float>();
        args.y = y.as<Act>() + first * y.strides[0];
        args.y_stride = y.strides[0];
        if (args.post != nullptr) {
          args.post += first * args.post_stride;
          args.comb += first * args.comb_stride;
        }
        args.hc = static_cast<int32_t>(hc);
        args.width = static_cast<int32_t>(width);
        args.cols = static_cast<int32_t>(cols);
        args.rows = static_cast<int32_t>(rows);
        args.chunks = static_cast<int32_t>(chunks);
        args.parts = std::min(parts_of_row(count, width, Finish::kThreads), 8);
        launch.template run<Finish>(count * args.parts, args);
      }
    });
  });
}

template <typename Launch>
void hc_pre(const HcPreParams& params, const OpContext& context) {
  const int64_t hc = params.streams.shape[1];
  DSV4_CHECK(params.weights.fn.shape[0] == (2 + hc) * hc);
  HcFinishArgs finish{};
  finish.post = params.post.template as<float>();
  finish.post_stride = params.post.strides[0];
  finish.comb = params.comb.template as<float>();
  finish.comb_stride = params.comb.strides[0];
  finish.iterations = params.sinkhorn_iters;
  finish.norm_eps = params.norm_eps;
  finish.hc_eps = params.hc_eps;
  hc_mix<Launch>(params.streams, params.weights, finish, params.y, context);
}

template <typename Launch>
void hc_head(const HcHeadParams& params, const OpContext& context) {
  DSV4_CHECK(params.weights.fn.shape[0] == params.streams.shape[1]);
  HcFinishArgs finish{};
  finish.norm_eps = params.norm_eps;
  finish.hc_eps = params.hc_eps;
  hc_mix<Launch>(params.streams, params.weights, finish, params.y, context);
}

template <typename Launch>
void hc_post(const HcPostParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const Tensor& streams = params.streams;
  const int64_t tokens = streams.shape[0], hc = streams.shape[1], width = streams.shape[2];
  with_act<Launch>(streams.dtype, [&](auto act) {
    with_streams(hc, [&](auto capacity) {
      using Kernel = HcPost<decltype(act), decltype(capacity)::value>;
      const int32_t parts = parts_of_row(tokens, width, Kernel::kThreads);
      launch.template run<Kernel>(tokens * parts, {.f = params.f.data,
                                                   .f_stride = params.f.strides[0],
                                                   .post = params.post.template as<float>(),
                                                   .post_stride = params.post.strides[0],
                                                   .comb = params.comb.template as<float>(),
                                                   .comb_stride = params.comb.strides[0],
                                                   .streams = streams.data,
                                                   .token_stride = streams.strides[0],
                                                   .stream_stride = streams.strides[1],
                                                   .hc = static_cast<int32_t>(hc),
                                                   .width = static_cast<int32_t>(width),
                                                   .parts = parts});
    });
  });
}

template <typename Launch>
void route(const RouteParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const int64_t tokens = params.logits.shape[0], experts = params.logits.shape[1];
  const int64_t k = params.expert_ids.shape[1];
  DSV4_CHECK(experts <= Route::kMaxExperts && k <= Route::kMaxK && k <= experts);
  launch.template run<Route>(
      ceil_div(tokens, int64_t{Route::kTokens}),
      {.logits = params.logits.template as<float>(),
       .logits_stride = params.logits.strides[0],
       .bias = params.bias ? params.bias.template as<float>() : nullptr,
       .table = params.tid2eid ? params.tid2eid.template as<int64_t>() : nullptr,
       .table_stride = params.tid2eid.strides[0],
       .token_ids = params.token_ids,
       .expert_ids = params.expert_ids.template as<int32_t>(),
       .ids_stride = params.expert_ids.strides[0],
       .expert_weights = params.expert_weights.template as<float>(),
       .weights_stride = params.expert_weights.strides[0],
       .tokens = static_cast<int32_t>(tokens),
       .experts = static_cast<int32_t>(experts),
       .k = static_cast<int32_t>(k),
       .scaling = params.scaling});
}

/// The operations of this file in a device's table.
template <typename Launch>
void install_model_rows(Ops& ops) {
  ops.embed = embed<Launch>;
  ops.hc_pre = hc_pre<Launch>;
  ops.hc_post = hc_post<Launch>;
  ops.hc_head = hc_head<Launch>;
  ops.route = route<Launch>;
}

}  // namespace dsv4::gpu
