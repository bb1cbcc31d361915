#include "backends/nvidia/ops/attend.h"

#include <algorithm>
#include <limits>

#include "backends/nvidia/ops/attend_sm80.h"
#include "backends/nvidia/ops/attend_sm90.h"
#include "backends/nvidia/ops/families.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4::nvidia {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

RowSource source_of(const CacheView& cache, int64_t head_dim) {
  if (cache.format != KvFormat::kFp8DsMla && cache.format != KvFormat::kBf16 &&
      cache.format != KvFormat::kFp8) {
    fail(ErrorCode::kUnsupported, "attend on NVIDIA GPUs reads fp8_ds_mla, bf16 and fp8 rows, not ",
         kv_format_name(cache.format));
  }
  DSV4_CHECK(cache.row_elems == head_dim && cache.rows_per_block >= 1);
  const RowLayout layout = row_layout(cache.format, cache.row_elems);
  RowSource out;
  out.format = cache.format;
  out.base = cache.base;
  out.block_stride_bytes = cache.block_stride_bytes;
  out.rows_per_block = cache.rows_per_block;
  out.value_bytes = static_cast<int32_t>(layout.value_bytes);
  out.scale_bytes = static_cast<int32_t>(layout.scale_bytes);
  return out;
}

RowSource source_of(const RangeRows& rows, int64_t head_dim) {
  if (rows.begin == nullptr) return {};
  RowSource out = source_of(rows.cache, head_dim);
  DSV4_CHECK(rows.blocks.tokens_per_block == rows.cache.rows_per_block && rows.blocks.columns >= 1);
  out.kind = RowSource::kRange;
  out.table = rows.blocks.table;
  out.table_stride = rows.blocks.stride;
  out.columns = rows.blocks.columns;
  out.begin = rows.begin;
  out.end = rows.end;
  return out;
}

RowSource source_of(const ListedRows& rows, int64_t head_dim) {
  if (rows.length == nullptr) return {};
  RowSource out = source_of(rows.cache, head_dim);
  out.kind = RowSource::kList;
  out.slots = rows.slots;
  out.slots_stride = rows.stride;
  out.end = rows.length;
  return out;
}

RowSource source_of(const RaggedRows&, int64_t) {
  fail(ErrorCode::kUnsupported,
       "attend on NVIDIA GPUs takes ranges and padded lists, not flat ones");
}

RowSource source_of(std::monostate, int64_t) {
  return {};
}

bool is_aligned_16(const RowSource& rows) {
  return rows.kind == RowSource::kNone ||
         (reinterpret_cast<uintptr_t>(rows.base) | static_cast<uintptr_t>(rows.block_stride_bytes) |
          static_cast<uintptr_t>(rows.value_bytes)) %
                 16 ==
             0;
}

template <Op<AttendParams> kAttend, bool (*kMakesCodes)(const AttendParams&) = nullptr,
          bool (*kTakesRawQueries)(const AttendParams&) = nullptr>
void install(Ops& ops) {
  ops.attend = kAttend;
  ops.attend_makes_codes = kMakesCodes;
  ops.attend_takes_raw_queries = kTakesRawQueries;
}

}  // namespace

AttendArgs attend_args(const AttendParams& params) {
  if (params.q.dtype != DType::kBf16 || params.out.dtype != DType::kBf16) {
    fail(ErrorCode::kUnsupported, "attend on NVIDIA GPUs takes bf16 activations, not ",
         dtype_name(params.q.dtype), " and ", dtype_name(params.out.dtype));
  }
  AttendArgs out;
  out.q = params.q.as<uint16_t>();
  out.q_token_stride = params.q.strides[0];
  out.q_head_stride = params.q.strides[1];
  DSV4_CHECK(params.q.strides[2] == 1 && params.out.strides[2] == 1);
  out.out = params.out.as<uint16_t>();
  out.out_token_stride = params.out.strides[0];
  out.out_head_stride = params.out.strides[1];
  out.lse = params.lse;
  out.max_logits = params.max_logits;
  out.sink = params.sink;
  out.scale_log2 = static_cast<float>(static_cast<double>(params.softmax_scale) * kLog2E);
  out.num_tokens = static_cast<int32_t>(params.q.shape[0]);
  out.num_heads = static_cast<int32_t>(params.q.shape[1]);
  out.head_dim = static_cast<int32_t>(params.q.shape[2]);
  out.round_p = params.round_p_to_bf16;
  out.token_to_seq = params.token_to_seq;
  const auto source = [&](const auto& rows) { return source_of(rows, params.q.shape[2]); };
  out.window = std::visit(source, params.window);
  out.compressed = std::visit(source, params.compressed);
  out.rows_per_block = params.grid.rows_per_block;
  out.blocks_per_chain = params.grid.blocks_per_chain;
  DSV4_CHECK(out.rows_per_block >= 1 && out.rows_per_block <= 64 && out.blocks_per_chain >= 1);
  DSV4_CHECK(out.token_to_seq != nullptr ||
             (out.window.kind != RowSource::kRange && out.compressed.kind != RowSource::kRange));
  if (out.compressed.kind != RowSource::kNone) {
    const int64_t blocks = ceil_div(std::max<int64_t>(0, params.max_entries), out.rows_per_block);
    out.max_blocks = static_cast<int32_t>(blocks);
    out.max_chains =
        static_cast<int32_t>(std::max<int64_t>(1, ceil_div(blocks, out.blocks_per_chain)));
  }
  return out;
}

bool is_aligned_16(const AttendArgs& args) {
  const auto bytes = [](const void* data, int64_t token_stride, int64_t head_stride) {
    return reinterpret_cast<uintptr_t>(data) |
           static_cast<uintptr_t>(2 * (token_stride | head_stride));
  };
  return (bytes(args.q, args.q_token_stride, args.q_head_stride) |
          bytes(args.out, args.out_token_stride, args.out_head_stride)) %
                 16 ==
             0 &&
         is_aligned_16(args.window) && is_aligned_16(args.compressed);
}

std::span<const Candidate> attend_candidates() {
  static const Candidate list[] = {
      {"attend", "sm90", needs_sm90,
       install<attend_sm90, attend_sm90_makes_codes, attend_sm90_takes_raw_queries>},
      {"attend", "sm90_few_heads", needs_sm90, install<attend_sm90_few_heads>},
      {"attend", "sm90_many_heads", needs_sm90, install<attend_sm90_many_heads>},
      {"attend", "sm80", needs_sm80, install<attend_sm80>},
      {"attend", "reference", needs_sm80, install<attend_reference>},
  };
  return list;
}

int64_t attend_scratch_bytes(const ScratchLimits& limits) {
  const int64_t entries = limits.index_topk > 0 ? limits.index_topk : limits.max_entries;
  return std::max(attend80::scratch_bytes(entries), attend_sm90_scratch_bytes(limits, entries));
}

}  // namespace dsv4::nvidia
