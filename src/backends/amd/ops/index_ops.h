// The indexer's operations over the kernels of index_logits.h and top_k.h; the launcher is that of
// gpu/rowwise_ops.h.
#pragma once
#include <algorithm>
#include <bit>

#include "backends/amd/ops/index_logits.h"
#include "backends/amd/ops/top_k.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "ops/ops.h"

namespace dsv4::amd {

/// Blocks that fill every GPU: 304 processors hold four of 256 lanes and a few hundred registers.
constexpr int64_t kIndexBlocks = 2048;

template <DType kCodes, int kHeadTiles, typename Launch>
void launch_index_logits(const IndexLogitsParams& params, const Launch& launch) {
  using Kernel = IndexLogits<kCodes, kHeadTiles>;
  const CacheView& cache = params.cache;
  const int64_t tokens = params.q.shape[0];
  const auto rows = static_cast<uint32_t>(cache.rows_per_block);
  // Whole tiles to a block, fewer blocks a token where tokens are many.
  const int64_t tiles = ceil_div(int64_t{params.max_end}, int64_t{Kernel::kTileKeys});
  const int64_t wanted = std::clamp<int64_t>(kIndexBlocks / tokens, 1, tiles);
  const int64_t block_tiles = ceil_div(tiles, wanted), splits = ceil_div(tiles, block_tiles);
  launch.template run<Kernel>(
      tokens * splits, {.q = params.q.as<uint16_t>(),
                        .q_token_stride = params.q.strides[0],
                        .q_head_stride = params.q.strides[1],
                        .weights = params.weights.as<float>(),
                        .weights_stride = params.weights.strides[0],
                        .token_to_seq = params.token_to_seq,
                        .end = params.end,
                        .table = params.blocks.table,
                        .table_stride = params.blocks.stride,
                        .cache = reinterpret_cast<const uint8_t*>(cache.base),
                        .block_stride_bytes = cache.block_stride_bytes,
                        .logits = params.logits.as<float>(),
                        .logits_stride = params.logits.strides[0],
                        .max_end = params.max_end,
                        .heads = static_cast<int32_t>(params.q.shape[1]),
                        .rows_per_block = cache.rows_per_block,
                        .rows_log2 = std::has_single_bit(rows) ? std::countr_zero(rows) : -1,
                        .splits = static_cast<int32_t>(splits),
                        .block_keys = static_cast<int32_t>(block_tiles * Kernel::kTileKeys)});
}

template <typename Launch>
void index_logits(const IndexLogitsParams& params, const OpContext& context) {
  const CacheView& cache = params.cache;
  const int64_t heads = params.q.shape[1];
  if (context.scratch->measuring() || params.q.shape[0] == 0 || params.max_end == 0) return;
  DSV4_CHECK(cache.format == KvFormat::kIndexFp8 || cache.format == KvFormat::kIndexMxfp4);
  DSV4_CHECK(params.q.dtype == DType::kBf16 && params.q.strides[2] == 1);
  DSV4_CHECK(params.q.shape[2] == kIndexDim && cache.row_elems == kIndexDim);
  DSV4_CHECK(heads >= 1 && heads <= kIndexMaxHeads);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  DSV4_CHECK(aligned(params.q.data) && params.q.strides[0] % 8 == 0 &&
             params.q.strides[1] % 8 == 0);
  DSV4_CHECK(aligned(cache.base) &&
             cache.block_stride_bytes % (cache.format == KvFormat::kIndexFp8 ? 8 : 4) == 0);
  const Launch launch(context);
  const bool few = heads <= 16;
  if (cache.format == KvFormat::kIndexFp8) {
    few ? launch_index_logits<DType::kF8E4M3, 1>(params, launch)
        : launch_index_logits<DType::kF8E4M3, 4>(params, launch);
  } else {
    few ? launch_index_logits<DType::kF4E2M1, 1>(params, launch)
        : launch_index_logits<DType::kF4E2M1, 4>(params, launch);
  }
}

template <typename Launch>
void top_k(const TopKParams& params, const OpContext& context) {
  if (context.scratch->measuring()) return;
  const Launch launch(context);
  launch.template run<TopK>(params.logits.shape[0],
                            {.logits = params.logits.template as<float>(),
                             .logits_stride = params.logits.strides[0],
                             .end = params.end,
                             .indices = params.topk_indices.template as<int32_t>(),
                             .indices_stride = params.topk_indices.strides[0],
                             .length = params.topk_length,
                             .k = static_cast<int32_t>(params.topk_indices.shape[1])});
}

template <typename Launch>
void install_index_logits(Ops& ops) {
  ops.index_logits = index_logits<Launch>;
}
template <typename Launch>
void install_top_k(Ops& ops) {
  ops.top_k = top_k<Launch>;
}

}  // namespace dsv4::amd
