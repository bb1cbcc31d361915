// The row-wise operations of a GPU device over the kernels of this folder: which kernel, which
// grid, which arguments. Written against a launcher, so that NVIDIA, AMD and the executor share it:
//
//   struct Launch {
//     explicit Launch(const OpContext& context);
//     template <typename Kernel> void run(int64_t blocks, const typename Kernel::Params&) const;
//   };
//
// Grids depend on shapes only, never on values: a step can be captured and replayed. With a
// measuring arena an operation takes its scratch memory and starts nothing.
#pragma once
#include <algorithm>
#include <cmath>

#include "backends/gpu/compress.h"
#include "backends/gpu/index_query.h"
#include "backends/gpu/norm_rope.h"
#include "backends/gpu/plan_rows.h"
#include "backends/gpu/ragged_rows.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "ops/ops.h"

namespace dsv4::gpu {

// Blocks that fill every GPU: some 16 each on the largest, whose 132 to 304 processors hold 8 of
// them. More work than that goes to longer blocks.
constexpr int64_t kFullGrid = 4096;
/// Blocks of QnormRopeInsert that run at once on the smallest of them: the few of a second turn
/// would take as long as the first.
constexpr int64_t kHeadsGrid = kFullGrid / 8;
/// Blocks of CompressPoolTiles, of which a processor holds 4 that live long.
constexpr int64_t kPoolGrid = kFullGrid / 4;
/// Up to here CompressEntries holds the pooled rows of an entry in registers.
constexpr int kFewPooledRows = CompressEntries<Bf16Rows, 8>::kRows;

/// Scratch that the operations below take at most.
inline int64_t rowwise_scratch_bytes(const ScratchLimits& limits) {
  const int64_t width = std::max(limits.head_dim, limits.index_dim);
  return round_up(limits.max_tokens * width * int64_t{sizeof(float)}, Arena::kAlignment);
}

// ---- arguments

inline Rope rope_of(const RopeView& rope) {
  DSV4_CHECK(rope.rope_dim % 2 == 0 && rope.rope_dim / 2 <= RopeTable::kMaxPairs);
  return {rope.frequencies, rope.rope_dim / 2};
}
inline CachePages pages_of(const CacheView& view) {
  DSV4_CHECK(view.row_elems % 2 == 0);
  return {reinterpret_cast<uint8_t*>(view.base), view.block_stride_bytes, view.rows_per_block,
          view.row_elems};
}
inline Blocks blocks_of(const BlockTable& blocks) {
  return {blocks.table, blocks.stride, blocks.columns, blocks.tokens_per_block};
}
inline bool is_bf16(const ConstTensor& tensor) {
  return tensor.dtype == DType::kBf16;
}

/// Whole tokens to a block where there are many, else as few as its groups.
inline TokenUnits cut_tokens(int64_t tokens, int64_t units, int64_t groups,
                             int64_t grid = kFullGrid) {
  const int64_t blocks_wanted = std::max<int64_t>(1, grid / std::max<int64_t>(1, tokens));
  const int64_t per_block = round_up(std::max<int64_t>(1, ceil_div(units, blocks_wanted)), groups);
  return {static_cast<int32_t>(tokens), static_cast<int32_t>(units),
          static_cast<int32_t>(per_block), static_cast<int32_t>(ceil_div(units, per_block))};
}
inline int64_t blocks_of(const TokenUnits& cut) {
  return int64_t{cut.tokens} * cut.blocks_per_token;
}

// ---- choices: run time values become template arguments here

/// Are there kernels for f32 activations and rows (`exact`)? A launcher of compiled kernels may say
/// `static constexpr bool kBf16Only = true`: half of them need not be compiled then.
template <typename Launch>
constexpr bool takes_f32() {
  if constexpr (requires { Launch::kBf16Only; }) {
    return !Launch::kBf16Only;
  } else {
    return true;
  }
}

/// f(type of a tensor's elements): bf16 or f32.
template <typename F>
void with_elems(DType dtype, F f) {
  if (dtype == DType::kBf16) {
    f(Bf16{});
  } else {
    DSV4_CHECK(dtype == DType::kF32);
    f(float{});
  }
}
/// f(type of the activations).
template <typename Launch, typename F>
void with_act(DType dtype, F f) {
  if constexpr (takes_f32<Launch>()) {
    with_elems(dtype, f);
  } else {
    if (dtype != DType::kBf16)
      fail(ErrorCode::kUnsupported, "these kernels take bf16 activations, not ", dtype_name(dtype));
    f(Bf16{});
  }
}
template <int kVectors>
using VectorCount = std::integral_constant<int, kVectors>;
template <Access kAccess>
using AccessOf = std::integral_constant<Access, kAccess>;

/// May pairs of its rows be moved at once?
inline bool has_aligned_pairs(const ConstTensor& tensor) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % (2 * size_of(tensor.dtype)) == 0;
  for (int i = 0; i + 1 < tensor.rank; ++i) aligned = aligned && tensor.strides[i] % 2 == 0;
  return aligned;
}

/// Rows of exactly 64 kFast elements that are aligned to pairs, as V4 has them, or any of at most
/// 64 kAny.
template <int kFast, int kAny, typename F>
void with_row_form(int64_t count, bool aligned, F f) {
  if (count == Row<kFast>::kMaxElems && aligned)
    return f(VectorCount<kFast>{}, AccessOf<Access::kWhole>{});
  if (count <= Row<kAny>::kMaxElems) return f(VectorCount<kAny>{}, AccessOf<Access::kElems>{});
  fail(ErrorCode::kUnsupported, "row of ", count, " elements: the GPU kernels take at most ",
       Row<kAny>::kMaxElems);
}

template <typename Launch, typename F>
void with_kv_rows(const CacheView& view, F f) {
  DSV4_CHECK(view.block_stride_bytes % 8 == 0);
  switch (view.format) {
    case KvFormat::kFp8DsMla:
      static_assert(Fp8DsMla::kNopeDim == Fp8DsMlaRows::kNopeDim &&
                    Fp8DsMla::kValueBytes == Fp8DsMlaRows::kValueBytes &&
                    Fp8DsMla::kScaleBytes == Fp8DsMlaRows::kScaleBytes);
      DSV4_CHECK(view.row_elems == Fp8DsMla::kHeadDim);
      return f(Fp8DsMlaRows{});
    case KvFormat::kBf16:
      return f(Bf16Rows{});
    case KvFormat::kFp8:
      return f(Fp8Rows{});
    case KvFormat::kF32:
    case KvFormat::kIndexF32:
      if constexpr (takes_f32<Launch>()) return f(F32Rows{});
      fail(ErrorCode::kUnsupported, "these kernels write no f32 rows");
    default:
      DSV4_CHECK(!"a row of a KV cache");
  }
}

/// f(writer of the format, register row) for compressed and indexer rows.
template <typename Launch, typename F>
void with_entry_rows(const CacheView& view, F f) {
  const auto with = [&]<int kSmall, int kLarge>(auto rows, VectorCount<kSmall>,
                                                VectorCount<kLarge>) {
    if (view.row_elems <= Row<kSmall>::kMaxElems) return f(rows, VectorCount<kSmall>{});
    DSV4_CHECK(view.row_elems <= Row<kLarge>::kMaxElems);
    f(rows, VectorCount<kLarge>{});
  };
  switch (view.format) {
    case KvFormat::kIndexFp8:
      return with(IndexFp8Rows{}, VectorCount<2>{}, VectorCount<8>{});
    case KvFormat::kIndexMxfp4:
      return with(IndexMxfp4Rows{}, VectorCount<2>{}, VectorCount<8>{});
    case KvFormat::kFp8DsMla:
      return with_kv_rows<Launch>(view, [&]<typename Rows>(Rows rows) {
        if constexpr (std::is_same_v<Rows, Fp8DsMlaRows>) f(rows, VectorCount<8>{});
      });
    default:
      with_kv_rows<Launch>(view, [&]<typename Rows>(Rows rows) {
        if constexpr (!std::is_same_v<Rows, Fp8DsMlaRows>)
          with(rows, VectorCount<8>{}, VectorCount<16>{});
      });
  }
}

// ---- operations

inline RmsNormArgs rms_norm_args(const RmsNormParams& params) {
  return {.x = params.x.data,
          .x_stride = params.x.strides[0],
          .weight = params.weight.data,
          .weight_is_bf16 = is_bf16(params.weight),
          .out = params.out.data,
          .out_stride = params.out.strides[0],
          .rows = static_cast<int32_t>(params.x.shape[0]),
          .count = static_cast<int32_t>(params.x.shape[1]),
          .eps = params.eps,
          .scale = params.scale.data,
          .scale_stride = params.scale.stride};
}
inline bool has_aligned_rows(const RmsNormParams& params) {
  return params.x.shape[1] % 2 == 0 && has_aligned_pairs(params.x) &&
         has_aligned_pairs(params.weight) && has_aligned_pairs(params.out);
}
inline bool writes_codes(const RmsNormParams& params) {
  if (params.out.dtype != DType::kF8E4M3) return false;
  const int64_t count = params.x.shape[1];
  DSV4_CHECK(is_bf16(params.x) && has_aligned_rows(params) && count % 128 == 0 && count <= 4096);
  return true;
}

/// Both norms of a layer's prepare() in one launch: long rows, and short ones of the same type.
/// @return whether they are such.
template <typename Launch>
bool rms_norm_pair(const RmsNormParams& first, const RmsNormParams& second, const Launch& launch) {
  const int64_t count = first.x.shape[1];
  const DType act = second.x.dtype;
  constexpr Access kPairs = Access::kPairs;
  constexpr int kShort = Row<8>::kMaxElems;
  if (count <= kShort || count > 4096 || second.x.shape[1] > kShort || first.x.dtype != act ||
      second.out.dtype != act || !has_aligned_rows(first) || !has_aligned_rows(second))
    return false;
  const auto run = [&]<typename First>(First) {
    using Act = typename First::Elem;
    using Second = RmsNormRows<Act, Act, 8, kPairs, First::kThreads>;
    const int64_t first_blocks = ceil_div(first.x.shape[0], int64_t{First::kBlockRows});
    launch.template run<RmsNormPair<First, Second>>(
        first_blocks + ceil_div(second.x.shape[0], int64_t{Second::kBlockRows}),
        {rms_norm_args(first), rms_norm_args(second), static_cast<int32_t>(first_blocks)});
  };
  const auto run_block = [&]<typename X, typename Out>(X, Out) {
    if (count <= 1024) return run(RmsNormBlock<X, Out, 2, kPairs>{});
    run(RmsNormBlock<X, Out, 8, kPairs>{});
  };
  if constexpr (requires { Launch::kWritesCodes; }) {
    if (writes_codes(first)) {
      run_block(Bf16{}, uint8_t{});
      return true;
    }
  }
  if (first.out.dtype != act) return false;
  with_act<Launch>(act, [&]<typename Act>(Act type) { run_block(type, type); });
  return true;
}

template <typename Launch>
void rms_norm(const RmsNormParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  if (params.beside != nullptr) {
    if (rms_norm_pair<Launch>(params, *params.beside, launch)) return;
    rms_norm<Launch>(*params.beside, context);
  }
  const RmsNormArgs args = rms_norm_args(params);
  const int64_t count = args.count;
  const bool aligned = has_aligned_rows(params);
  constexpr Access kPairs = Access::kPairs;
  const auto run = [&]<typename Kernel>(Kernel) {
    launch.template run<Kernel>(ceil_div(int64_t{args.rows}, int64_t{Kernel::kBlockRows}), args);
  };
  if constexpr (requires { Launch::kWritesCodes; }) {
    if (writes_codes(params)) {
      if (count <= Row<8>::kMaxElems) return run(RmsNormRows<Bf16, uint8_t, 8, kPairs>{});
      if (count <= 1024) return run(RmsNormBlock<Bf16, uint8_t, 2, kPairs>{});
      return run(RmsNormBlock<Bf16, uint8_t, 8, kPairs>{});
    }
  }
  with_act<Launch>(params.x.dtype, [&]<typename X>(X) {
    with_elems(params.out.dtype, [&]<typename Out>(Out) {
      if (aligned && count <= Row<8>::kMaxElems) return run(RmsNormRows<X, Out, 8, kPairs>{});
      if (aligned && count <= 1024) return run(RmsNormBlock<X, Out, 2, kPairs>{});
      if (aligned && count <= 4096) return run(RmsNormBlock<X, Out, 8, kPairs>{});
      if (aligned && count <= 8192) return run(RmsNormBlock<X, Out, 16, kPairs>{});
      run(RmsNormLong<X, Out>{});
    });
  });
}

template <typename Launch>
void qnorm_rope_insert(const QnormRopeInsertParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const Tensor& kv = params.kv;
  Tensor q = params.q;
  if (!q) q = Tensor(nullptr, kv.dtype, {kv.shape[0], 0, kv.shape[1]});
  const int64_t head_dim = kv.shape[1];
  DSV4_CHECK(head_dim % 2 == 0 && params.window.row_elems == head_dim && q.dtype == kv.dtype &&
             q.shape[2] == head_dim);
  QnormRopeInsertArgs args{.cut = {},
                           .kv_is_a_part = false,
                           .q = q.data,
                           .q_token_stride = q.strides[0],
                           .q_head_stride = q.strides[1],
                           .kv = kv.data,
                           .kv_stride = kv.strides[0],
                           .kv_norm = nullptr,
                           .kv_norm_is_bf16 = false,
                           .rope = rope_of(params.rope),
                           .positions = params.positions,
                           .slots = params.slot_mapping,
                           .cache = pages_of(params.window),
                           .head_dim = static_cast<int32_t>(head_dim),
                           .eps = params.eps};
  const bool aligned = has_aligned_pairs(q) && has_aligned_pairs(kv);
  // V4's rows are normed by the same launch where codes are written, others by one before it.
  bool norms_kv = false;
  if (params.kv_norm) {
    if constexpr (requires { Launch::kWritesCodes; }) {
      norms_kv = q.dtype == DType::kBf16 && head_dim == Row<8>::kMaxElems && aligned &&
                 has_aligned_pairs(params.kv_norm);
    }
    if (norms_kv) {
      args.kv_norm = params.kv_norm.data;
      args.kv_norm_is_bf16 = is_bf16(params.kv_norm);
    } else {
      rms_norm<Launch>({.x = kv, .weight = params.kv_norm, .eps = params.eps, .out = kv}, context);
    }
  }
  with_act<Launch>(q.dtype, [&]<typename Act>(Act) {
    with_kv_rows<Launch>(params.window, [&]<typename Rows>(Rows) {
      constexpr int kAny = std::is_same_v<Rows, Fp8DsMlaRows> ? 8 : 16;
      with_row_form<8, kAny>(head_dim, aligned, [&](auto vectors, auto access) {
        using Kernel =
            QnormRopeInsert<Act, Rows, decltype(vectors)::value, decltype(access)::value>;
        const int64_t tokens = q.shape[0];
        args.cut = cut_tokens(tokens, q.shape[1], Kernel::kGroups,
                              tokens <= kHeadsGrid ? kHeadsGrid : kFullGrid);
        args.kv_is_a_part = q.shape[1] == 0 || blocks_of(args.cut) + tokens <= kHeadsGrid;
        if (args.kv_is_a_part) ++args.cut.blocks_per_token;
        if constexpr (requires { Launch::kWritesCodes; } && std::is_same_v<Act, Bf16> &&
                      decltype(access)::value == Access::kWhole) {
          if (norms_kv) {
            return launch.template run<
                QnormRopeInsert<Act, Rows, decltype(vectors)::value, Access::kWhole, true>>(
                blocks_of(args.cut), args);
          }
        }
        launch.template run<Kernel>(blocks_of(args.cut), args);
      });
    });
  });
}

template <typename Launch>
void inverse_rope(const InverseRopeParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const ConstTensor& o = params.o;
  const int64_t head_dim = o.shape[2];
  DSV4_CHECK(head_dim % 2 == 0);
  InverseRopeArgs args{.cut = {},
                       .o = o.data,
                       .o_token_stride = o.strides[0],
                       .o_head_stride = o.strides[1],
                       .out = params.out.data,
                       .out_token_stride = params.out.strides[0],
                       .out_head_stride = params.out.strides[1],
                       .rope = rope_of(params.rope),
                       .positions = params.positions,
                       .head_dim = static_cast<int32_t>(head_dim),
                       .scale = params.scale.data,
                       .scale_stride = params.scale.stride};
  const bool aligned = has_aligned_pairs(o) && has_aligned_pairs(params.out);
  if constexpr (requires { Launch::kWritesCodes; }) {
    if (params.out.dtype == DType::kF8E4M3) {
      DSV4_CHECK(params.quantise && head_dim % 128 == 0 && aligned);
      return with_act<Launch>(o.dtype, [&]<typename Act>(Act) {
        with_row_form<8, 16>(head_dim, aligned, [&](auto vectors, auto access) {
          using Kernel =
              InverseRope<Act, uint8_t, true, decltype(vectors)::value, decltype(access)::value>;
          args.cut = cut_tokens(o.shape[0], o.shape[1], Kernel::kThreads / kGroupLanes);
          launch.template run<Kernel>(blocks_of(args.cut), args);
        });
      });
    }
  }
  with_act<Launch>(o.dtype, [&]<typename Act>(Act) {
    with_act<Launch>(params.out.dtype, [&]<typename Out>(Out) {
      with_row_form<8, 16>(head_dim, aligned, [&](auto vectors, auto access) {
        const auto run = [&](auto quantise) {
          using Kernel = InverseRope<Act, Out, decltype(quantise)::value, decltype(vectors)::value,
                                     decltype(access)::value>;
          args.cut = cut_tokens(o.shape[0], o.shape[1], Kernel::kThreads / kGroupLanes);
          launch.template run<Kernel>(blocks_of(args.cut), args);
        };
        if (params.quantise) {
          run(std::true_type{});
        } else {
          run(std::false_type{});
        }
      });
    });
  });
}

template <typename Launch>
void index_query(const IndexQueryParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const ConstTensor& q = params.q;
  const int64_t heads = q.shape[1], dim = q.shape[2];
  DSV4_CHECK(dim % 2 == 0);
  IndexQueryArgs args{
      .cut = {},
      .q = q.data,
      .q_token_stride = q.strides[0],
      .q_head_stride = q.strides[1],
      .weights = params.weights.data,
      .weights_token_stride = params.weights.strides[0],
      .weights_head_stride = params.weights.strides[1],
      .weights_are_bf16 = is_bf16(params.weights),
      .q_out = params.q_out.data,
      .out_token_stride = params.q_out.strides[0],
      .out_head_stride = params.q_out.strides[1],
      .weights_out = params.weights_out.as<float>(),
      .weights_out_stride = params.weights_out.strides[0],
      .rope = rope_of(params.rope),
      .positions = params.positions,
      .dim = static_cast<int32_t>(dim),
      .hadamard = params.hadamard,
      // index_scale as its two factors, as the CPU multiplies them
      .dim_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim))),
      .heads_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(heads)))};
  const bool aligned = has_aligned_pairs(q) && has_aligned_pairs(params.q_out);
  with_act<Launch>(q.dtype, [&]<typename Act>(Act) {
    with_row_form<2, 8>(dim, aligned, [&](auto vectors, auto access) {
      const auto run = [&](auto form) {
        using Kernel = IndexQuery<Act, decltype(form)::value, decltype(vectors)::value,
                                  decltype(access)::value>;
        args.cut = cut_tokens(q.shape[0], heads, Kernel::kThreads / kGroupLanes);
        launch.template run<Kernel>(blocks_of(args.cut), args);
      };
      if constexpr (requires { Launch::kWritesCodes; }) {
        if (params.q_out.dtype == DType::kF8E4M3) {
          DSV4_CHECK(params.format == KvFormat::kIndexFp8 && aligned);
          return run(std::integral_constant<IndexForm, IndexForm::kFp8Codes>{});
        }
      }
      switch (params.format) {
        case KvFormat::kIndexFp8:
          return run(std::integral_constant<IndexForm, IndexForm::kFp8Row>{});
        case KvFormat::kIndexMxfp4:
          return run(std::integral_constant<IndexForm, IndexForm::kMxfp4>{});
        default:
          return run(std::integral_constant<IndexForm, IndexForm::kNone>{});
      }
    });
  });
}

/// Are an entry's rows few enough to be in registers?
inline bool pools_few_rows(const CompressParams& params) {
  return (params.overlap ? 2 : 1) * params.ratio->ratio <= kFewPooledRows;
}
/// All but the grids.
inline CompressArgs compress_args(const CompressParams& params, float* pooled) {
  const PlanView& plan = *params.plan;
  const int64_t width = params.cache.row_elems;
  const int windows = params.overlap ? 2 : 1;
  const StateView& state = params.state;
  // Rows are read 16 bytes a lane.
  DSV4_CHECK(width % CompressPoolTiles::kChannels == 0);
  DSV4_CHECK(params.gates.shape[1] == 2 * windows * width && params.gates.strides[0] % 4 == 0 &&
             params.ape.strides[0] % 4 == 0 && state.slot_stride_elems % 4 == 0 &&
             has_aligned_pairs(params.norm));
  return {.tokens = plan.num_tokens,
          .ratio = params.ratio->ratio,
          .windows = windows,
          .width = static_cast<int32_t>(width),
          .query_start = plan.query_start,
          .context_len = plan.context_len,
          .state_slot = plan.state_slot,
          .positions = plan.positions,
          .token_to_seq = plan.token_to_seq,
          .slots = params.ratio->slot_mapping,
          .gates = params.gates.as<float>(),
          .gates_stride = params.gates.strides[0],
          .ape = params.ape.as<float>(),
          .ape_stride = params.ape.strides[0],
          .state = state.base,
          .state_slot_stride = state.slot_stride_elems,
          .ring_rows = state.ring_rows,
          .state_row_elems = state.row_elems,
          .pooled = pooled,
          .norm = params.norm.data,
          .norm_is_bf16 = is_bf16(params.norm),
          .hadamard = params.hadamard,
          .round_to_bf16 = params.activation == DType::kBf16,
          .eps = params.eps,
          .rope = rope_of(params.rope),
          .cache = pages_of(params.cache),
          .entries = params.entries ? params.entries.as<float>() : nullptr,
          .entries_stride = params.entries.strides[0],
          .keeps_rows = plan.max_query_len == 1,
          .tokens_per_block = 1,
          .channel_blocks = 1,
          .entry_blocks = 0,
          .ring_tokens_per_block = 1};
}

template <typename Launch>
void compress(const CompressParams& params, const OpContext& context) {
  const int64_t tokens = params.plan->num_tokens, width = params.cache.row_elems;
  const bool few_rows = pools_few_rows(params);
  Arena::Scope scope(*context.scratch);
  float* pooled = few_rows ? nullptr : context.scratch->take_array<float>(tokens * width);
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  CompressArgs args = compress_args(params, pooled);
  if (!few_rows) {
    using Kernel = CompressPoolTiles;
    args.channel_blocks = static_cast<int32_t>(width / Kernel::kChannels);
    args.tokens_per_block = static_cast<int32_t>(
        std::clamp<int64_t>(tokens * args.channel_blocks / kPoolGrid, 1, int64_t{kGroupLanes}));
    launch.template run<Kernel>(
        ceil_div(tokens, int64_t{args.tokens_per_block}) * args.channel_blocks, args);
  }
  with_entry_rows<Launch>(params.cache, [&]<typename Rows, typename Vectors>(Rows, Vectors) {
    if (few_rows) launch.template run<CompressEntries<Rows, Vectors::value>>(tokens, args);
    using Kernel = CompressFinish<Rows, Vectors::value>;
    args.ring_tokens_per_block =
        static_cast<int32_t>(std::max<int64_t>(1, tokens / (kFullGrid / 4)));
    args.entry_blocks =
        few_rows ? 0 : static_cast<int32_t>(ceil_div(tokens, int64_t{Kernel::kEntries}));
    const int64_t ring_blocks =
        args.keeps_rows ? 0 : ceil_div(tokens, int64_t{args.ring_tokens_per_block});
    launch.template run<Kernel>(args.entry_blocks + ring_blocks, args);
  });
}

template <typename Launch>
void expand_plan(const ExpandPlanParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const PlanView& plan = params.plan;
  DSV4_CHECK(plan.ratios.size() <= ExpandPlanArgs::kMaxRatios);
  ExpandPlanArgs args{.tokens = plan.num_tokens,
                      .seqs = plan.num_seqs,
                      .sliding_window = params.sliding_window,
                      .query_start = plan.query_start,
                      .context_len = plan.context_len,
                      .window_blocks = blocks_of(plan.window_blocks),
                      .growing_blocks = blocks_of(plan.growing_blocks),
                      .positions = plan.positions,
                      .token_to_seq = plan.token_to_seq,
                      .window_slot_mapping = plan.window_slot_mapping,
                      .window_begin = plan.window_begin,
                      .window_end = plan.window_end,
                      .num_ratios = static_cast<int32_t>(plan.ratios.size()),
                      .ratios = {}};
  for (size_t i = 0; i < plan.ratios.size(); ++i) {
    const RatioPlan& ratio = plan.ratios[i];
    args.ratios[i] = {ratio.ratio, ratio.slot_mapping, ratio.begin, ratio.end};
  }
  launch.template run<ExpandPlan>(ceil_div(int64_t{plan.num_tokens}, int64_t{ExpandPlan::kThreads}),
                                  args);
}

template <typename Launch>
void map_slots(const MapSlotsParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const ConstTensor& in = params.topk_indices;
  const int64_t blocks_per_token = ceil_div(in.shape[1], int64_t{MapSlots::kBlockEntries});
  launch.template run<MapSlots>(in.shape[0] * blocks_per_token,
                                {.entries = in.as<int32_t>(),
                                 .entries_stride = in.strides[0],
                                 .slots = params.slots.as<int32_t>(),
                                 .slots_stride = params.slots.strides[0],
                                 .token_to_seq = params.token_to_seq,
                                 .blocks = blocks_of(params.blocks),
                                 .rows_per_block = params.rows_per_block,
                                 .count = static_cast<int32_t>(in.shape[1]),
                                 .blocks_per_token = static_cast<int32_t>(blocks_per_token)});
}

template <typename Launch>
void ragged_rows(const RaggedRowsParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  RaggedArgs args{.tokens = params.num_tokens,
                  .begin = nullptr,
                  .end = nullptr,
                  .blocks = {},
                  .token_to_seq = params.token_to_seq,
                  .list = nullptr,
                  .list_stride = 0,
                  .indptr = params.indptr,
                  .slots = params.slots};
  if (const auto* ranges = std::get_if<RangeRows>(&params.rows)) {
    args.begin = ranges->begin;
    args.end = ranges->begin == nullptr ? nullptr : ranges->end;
    args.blocks = blocks_of(ranges->blocks);
  } else {
    const auto& lists = std::get<ListedRows>(params.rows);
    args.end = lists.length;
    args.list = lists.slots;
    args.list_stride = lists.stride;
  }
  launch.template run<RaggedIndptr>(1, args);
  launch.template run<RaggedFill>(params.num_tokens, args);
}

/// A block for every 16 bytes of each lane, or fewer where rows are many.
inline int32_t blocks_per_row(int64_t rows, int64_t row_bytes, int64_t threads) {
  const int64_t wanted = std::max<int64_t>(1, kFullGrid / std::max<int64_t>(1, rows));
  return static_cast<int32_t>(std::clamp<int64_t>(ceil_div(row_bytes, 16 * threads), 1, wanted));
}

template <typename Launch>
void gather_rows(const GatherRowsParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const int64_t size = size_of(params.x.dtype), rows = params.out.shape[0];
  const int64_t row_bytes = params.x.shape[1] * size;
  const int32_t parts = blocks_per_row(rows, row_bytes, GatherRows::kThreads);
  launch.template run<GatherRows>(rows * parts, {.x = params.x.as<uint8_t>(),
                                                 .x_stride_bytes = params.x.strides[0] * size,
                                                 .rows = params.rows,
                                                 .out = params.out.as<uint8_t>(),
                                                 .out_stride_bytes = params.out.strides[0] * size,
                                                 .row_bytes = row_bytes,
                                                 .blocks_per_row = parts});
}

template <typename Launch>
void zero(const ZeroParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const Tensor& out = params.out;
  DSV4_CHECK(out.rank == 2 || out.rank == 3);
  const int64_t size = size_of(out.dtype);
  int64_t inner = out.rank == 3 ? out.shape[1] : 1, row_elems = out.shape[out.rank - 1];
  if (inner > 1 && out.strides[1] == row_elems) {  // heads side by side are one row
    row_elems *= inner;
    inner = 1;
  }
  const int64_t rows = out.shape[0] * inner, row_bytes = row_elems * size;
  if (rows == 0) return;
  const int32_t parts = blocks_per_row(rows, row_bytes, Zero::kThreads);
  launch.template run<Zero>(rows * parts,
                            {.out = out.as<uint8_t>(),
                             .outer_stride_bytes = out.strides[0] * size,
                             .inner_stride_bytes = out.rank == 3 ? out.strides[1] * size : 0,
                             .row_bytes = row_bytes,
                             .inner = static_cast<int32_t>(inner),
                             .blocks_per_row = parts});
}

/// The operations of this file in a device's table.
template <typename Launch>
void install_rowwise(Ops& ops) {
  ops.rms_norm = rms_norm<Launch>;
  ops.gather_rows = gather_rows<Launch>;
  ops.zero = zero<Launch>;
  ops.expand_plan = expand_plan<Launch>;
  ops.qnorm_rope_insert = qnorm_rope_insert<Launch>;
  if constexpr (!requires { Launch::kOwnCompressor; }) ops.compress = compress<Launch>;
  ops.index_query = index_query<Launch>;
  ops.map_slots = map_slots<Launch>;
  ops.ragged_rows = ragged_rows<Launch>;
  ops.inverse_rope = inverse_rope<Launch>;
}

}  // namespace dsv4::gpu
