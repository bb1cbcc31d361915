// The attend operation over a launcher (gpu/rowwise_ops.h): which kernel, which grid, which
// arguments.
#pragma once
#include <optional>

#include "backends/amd/ops/attend.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "ops/ops.h"

namespace dsv4::amd {

inline RowSource source_of(const CacheView& cache) {
  DSV4_CHECK(cache.row_elems == 512 && cache.rows_per_block >= 1);
  if ((reinterpret_cast<uintptr_t>(cache.base) | static_cast<uintptr_t>(cache.block_stride_bytes)) %
          4 !=
      0) {
    fail(ErrorCode::kUnsupported, "attend on AMD GPUs reads pages at multiples of 4 bytes");
  }
  const RowLayout layout = row_layout(cache.format, cache.row_elems);
  RowSource out{};
  out.base = reinterpret_cast<const uint8_t*>(cache.base);
  out.block_stride_bytes = cache.block_stride_bytes;
  out.rows_per_block = cache.rows_per_block;
  out.value_bytes = static_cast<int32_t>(layout.value_bytes);
  out.scale_bytes = static_cast<int32_t>(layout.scale_bytes);
  return out;
}
inline RowSource source_of(const RangeRows& rows) {
  if (rows.begin == nullptr) return {};
  RowSource out = source_of(rows.cache);
  DSV4_CHECK(rows.blocks.tokens_per_block == rows.cache.rows_per_block && rows.blocks.columns >= 1);
  out.kind = RowSource::kRange;
  out.table = rows.blocks.table;
  out.table_stride = rows.blocks.stride;
  out.columns = rows.blocks.columns;
  out.begin = rows.begin;
  out.end = rows.end;
  return out;
}
inline RowSource source_of(const ListedRows& rows) {
  if (rows.length == nullptr) return {};
  RowSource out = source_of(rows.cache);
  out.kind = RowSource::kList;
  out.table = rows.slots;
  out.table_stride = rows.stride;
  out.end = rows.length;
  return out;
}
inline RowSource source_of(const RaggedRows& rows) {
  RowSource out = source_of(rows.cache);
  out.kind = RowSource::kFlat;
  out.table = rows.slots;
  out.begin = rows.indptr;
  out.end = rows.indptr + 1;
  return out;
}
inline RowSource source_of(std::monostate) {
  return {};
}

inline std::optional<KvFormat> format_of(const RangeRows& rows) {
  return rows.begin == nullptr ? std::nullopt : std::optional(rows.cache.format);
}
inline std::optional<KvFormat> format_of(const ListedRows& rows) {
  return rows.length == nullptr ? std::nullopt : std::optional(rows.cache.format);
}
inline std::optional<KvFormat> format_of(const RaggedRows& rows) {
  return rows.cache.format;
}
inline std::optional<KvFormat> format_of(std::monostate) {
  return std::nullopt;
}

/// The format of all rows. @throws Error kUnsupported naming what the kernels do not take.
inline KvFormat attend_format(const AttendParams& params) {
  const auto refuse = [](const auto&... what) {
    fail(ErrorCode::kUnsupported, "attend on AMD GPUs takes ", what...);
  };
  if (params.q.dtype != DType::kBf16 || params.out.dtype != DType::kBf16) {
    refuse("bf16 activations, not ", dtype_name(params.q.dtype), " and ",
           dtype_name(params.out.dtype));
  }
  if (params.q.shape[2] != 512) refuse("a head_dim of 512, not ", params.q.shape[2]);
  if (params.grid.rows_per_block != kBlockRows || params.grid.blocks_per_chain < 1)
    refuse("blocks of ", kBlockRows, " rows, not ", params.grid.rows_per_block);
  if (!params.round_p_to_bf16) refuse("weights that are rounded to bf16");
  const auto visit = [](const auto& rows) { return format_of(rows); };
  const std::optional<KvFormat> window = std::visit(visit, params.window);
  const std::optional<KvFormat> compressed = std::visit(visit, params.compressed);
  if (window && compressed && *window != *compressed) {
    refuse("caches of one format, not ", kv_format_name(*window), " and ",
           kv_format_name(*compressed));
  }
  const KvFormat format = window ? *window : compressed.value_or(KvFormat::kFp8DsMla);
  if (format != KvFormat::kFp8DsMla && format != KvFormat::kBf16 && format != KvFormat::kFp8)
    refuse("fp8_ds_mla, bf16 and fp8 rows, not ", kv_format_name(format));
  const auto unaligned = [](const auto& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.data) % 4 != 0 || tensor.strides[0] % 2 != 0 ||
           tensor.strides[1] % 2 != 0 || tensor.strides[2] != 1;
  };
  if (unaligned(params.q) || unaligned(params.out)) refuse("q and out at multiples of 4 bytes");
  return format;
}

inline AttendArgs attend_args(const AttendParams& params) {
  constexpr double kLog2E = 1.4426950408889634074;
  const auto source = [](const auto& rows) { return source_of(rows); };
  AttendArgs out{
      .q = params.q.as<uint16_t>(),
      .q_token_stride = params.q.strides[0],
      .q_head_stride = params.q.strides[1],
      .out = params.out.as<uint16_t>(),
      .out_token_stride = params.out.strides[0],
      .out_head_stride = params.out.strides[1],
      .lse = params.lse,
      .max_logits = params.max_logits,
      .sink = params.sink,
      .token_to_seq = params.token_to_seq,
      .rows = {std::visit(source, params.window), std::visit(source, params.compressed)},
      .scale_log2 = static_cast<float>(static_cast<double>(params.softmax_scale) * kLog2E),
      .num_heads = static_cast<int32_t>(params.q.shape[1]),
      .head_tiles = 1,
      .blocks_per_chain = params.grid.blocks_per_chain};
  DSV4_CHECK(out.token_to_seq != nullptr ||
             (out.rows[0].kind != RowSource::kRange && out.rows[1].kind != RowSource::kRange));
  return out;
}

template <typename Launch, typename Kernel>
void run_attend(const Launch& launch, int64_t tokens, AttendArgs args) {
  args.head_tiles = static_cast<int32_t>(ceil_div(args.num_heads, Kernel::kHeads));
  DSV4_CHECK(tokens * args.head_tiles <= INT32_MAX);
  launch.template run<Kernel>(tokens * args.head_tiles, args);
}

template <typename Launch>
void attend(const AttendParams& params, const OpContext& context) {
  const KvFormat format = attend_format(params);
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  const AttendArgs args = attend_args(params);
  const int64_t tokens = params.q.shape[0];
  // Tiles of 32 heads share converted rows; with few tokens more blocks are worth more. All give
  // the same bits. MI355X has 256 compute units, MI300X 304.
  constexpr int64_t kComputeUnits = 256;
  const bool chains = params.max_entries > int64_t{kBlockRows} * args.blocks_per_chain;
  const bool wide_tiles = args.num_heads > 16 &&
                          tokens * ceil_div(int64_t{args.num_heads}, int64_t{32}) >= kComputeUnits;
  const auto run = [&]<typename Rows>(Rows) {
    if (chains) return run_attend<Launch, Attend<Rows, 1, true>>(launch, tokens, args);
    if (wide_tiles) return run_attend<Launch, Attend<Rows, 2, false>>(launch, tokens, args);
    run_attend<Launch, Attend<Rows, 1, false>>(launch, tokens, args);
  };
  switch (format) {
    case KvFormat::kBf16:
      return run(PlainBf16Rows{});
    case KvFormat::kFp8:
      return run(PlainFp8Rows{});
    default:
      return run(Fp8DsMlaRows{});
  }
}

template <typename Launch>
void install_attend(Ops& ops) {
  ops.attend = attend<Launch>;
}

}  // namespace dsv4::amd
