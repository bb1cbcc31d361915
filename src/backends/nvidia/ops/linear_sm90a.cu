// sm90_linear: products of many rows of bf16 x with FP8 or bf16 weights.
//
// Problem   out[m, n] = sum_k x[m, k] W[n, k], W expanded to bf16, scale included
// Tiling    128 (or 64) rows of W x kN tokens (16 .. 128). W is the A operand of wgmma from
//           registers (64 rows a warpgroup), where it is expanded; tokens are its N.
//           A thread asks the copy
//           engine for W as stored, 128 bytes a row, and for x as prepared. Segments: a block = a
//           tile's segment of K; a cluster of blocks shares K, sums are exchanged through
//           distributed shared memory and added in ascending order. Walk: a block = a tile, all
//           segments; blocks stride over tiles. Streams (up to 128 tokens): the same with twice the
//           warps, of which half work on the next segment; or two blocks a tile, half of K
//           each, of 128 or 64 rows
// Budget    few tokens: bytes of W at 4.27 TB/s = 16 B a clock and multiprocessor; expansion of FP8
//           2 instructions a code: 0.25 of the issue slots at that rate. 128 x 64 tokens x 128
//           columns: 512 clocks of the tensor cores, 430 issue slots a scheduler, 80 KB through
//           shared memory = 640 clocks.
//           Many: 128 x 128 x 64 columns: 512 clocks of the tensor cores, 110 issue slots a warp of
//           which two share a scheduler; 24 KB from L2 = 47 B a clock, more than L2 gives
// Launch    384 threads (streams 640); grid tiles * segments in clusters, or min(tiles, SMs), or
//           tiles * 2 in clusters of 2; may start before the kernel that prepares x has ended, and
//           reads W meanwhile
// Contract  sm90_takes(); x as Sm90Item says
// Numerics  the order of linear.h
#include <algorithm>

#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90-inl.h"
#include "backends/nvidia/ops/linear_sm90_streams-inl.h"
#include "backends/nvidia/ops/tensor_map.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

// Out of the sums of the cluster's blocks: every block adds up its share of the outputs, four rows
// of a token at a time.
template <typename Tile, int kN>
__device__ __forceinline__ void add_segments(const Sm90Work& work, int rank, int segments,
                                             const float* sums) {
  constexpr int kFours = Tile::kRows / 4;
  const int own_segments = linear_num_segments(work.item->w.cols);
  const int share = (kN * kFours + segments - 1) / segments;
  const int begin = rank * share, end = min(begin + share, kN * kFours);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += Tile::kWarps * 32) {
    const int token = i / kFours, row = i % kFours * 4;
    const uint32_t address = sm80::shared_address(sums + token * Tile::kSumStride + row);
    float4 parts[kLinearMaxSegments];
#pragma unroll
    for (int s = 0; s < kLinearMaxSegments; ++s) {
      if (s < own_segments) parts[s] = sm90::load_from_cluster(address, static_cast<uint32_t>(s));
    }
    float4 total = parts[0];
#pragma unroll
    for (int s = 1; s < kLinearMaxSegments; ++s) {
      if (s >= own_segments) break;
      total.x = __fadd_rn(total.x, parts[s].x);
      total.y = __fadd_rn(total.y, parts[s].y);
      total.z = __fadd_rn(total.z, parts[s].z);
      total.w = __fadd_rn(total.w, parts[s].w);
    }
    store_rows(*work.item, work.token0 + token, work.row0 + row, total);
  }
}

template <DType kDType, int kN>
__global__ void __launch_bounds__(Sm90Tile<kDType, kN, false>::kThreads,
                                  Sm90Tile<kDType, kN, false>::kBlocksPerSm)
    sm90_linear_segments(const __grid_constant__ Sm90Batch batch, int segments) {
  using Tile = Sm90Tile<kDType, kN, false>;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<Sm90Shared<Tile, false>*>(raw);
  init_barriers<Tile>(shared);
  __syncthreads();
  const auto rank = static_cast<int>(sm90::cluster_rank());
  Sm90Work work = find_work<Tile, kN>(batch, static_cast<int>(blockIdx.x) / segments);
  const int segment_panels = sm90_segment_panels(work.item->w.cols);
  work.panel_begin = min(rank * segment_panels, work.panel_end);
  work.panel_end = min(work.panel_begin + segment_panels, work.panel_end);
  sm90::RingPlace<Tile::kStages> place;
  if (threadIdx.x >= Tile::kWarps * 32) {
    take_copy_role<Tile>();
    if (threadIdx.x == Tile::kWarps * 32) {
      copy_tile<Tile>(work, true, shared, place);
      sm90::start_next_kernel();  // not sooner: what it asks for would stand in front of W
    }
    __syncwarp();
    sm90::cluster_arrive_relaxed();
    sm90::cluster_wait();
  } else {
    take_multiply_role<Tile>();
    const int row = warp_of_block() / 4 * 64;
    const uint32_t scales = load_scales<kDType>(work.item->w, work.row0 + row, work.panel_begin);
    float sums[kN / 2];
    multiply_panels<Tile, kDType, kN>(work, row, scales, work.panel_begin, work.panel_end,
                                      shared.whole_ring(), place, sums);
    sm90::barrier_sync(1, Tile::kWarps * 32);  // the ring is empty
    put_sums<Tile, kN>(shared.sums(), sums);
    sm90::cluster_arrive();
    sm90::cluster_wait();
    add_segments<Tile, kN>(work, rank, segments, shared.sums());
  }
  sm90::cluster_arrive_relaxed();
  sm90::cluster_wait();  // nobody leaves while others read its sums
}

template <DType kDType, int kN>
__global__ void __launch_bounds__(Sm90Tile<kDType, kN, true>::kThreads, 1)
    sm90_linear_walk(const __grid_constant__ Sm90Batch batch, int tiles) {
  using Tile = Sm90Tile<kDType, kN, true>;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<Sm90Shared<Tile, true>*>(raw);
  init_barriers<Tile>(shared);
  __syncthreads();
  const auto first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  sm90::RingPlace<Tile::kStages> place;
  if (threadIdx.x >= Tile::kWarps * 32) {
    take_copy_role<Tile>();
    if (threadIdx.x == Tile::kWarps * 32) {
      for (int tile = first; tile < tiles; tile += step)
        copy_tile<Tile>(find_work<Tile, kN>(batch, tile), tile == first, shared, place);
      sm90::start_next_kernel();  // as above
    }
    return;
  }
  take_multiply_role<Tile>();
  const auto thread = static_cast<int>(threadIdx.x);
  for (int tile = first; tile < tiles; tile += step) {
    const Sm90Work work = find_work<Tile, kN>(batch, tile);
    const int segments = linear_num_segments(work.item->w.cols);
    const int segment_panels = sm90_segment_panels(work.item->w.cols);
    const int row = warp_of_block() / 4 * 64;
    uint32_t scales = load_scales<kDType>(work.item->w, work.row0 + row, 0);
    float totals[kN / 2];
    for (int s = 0; s < segments; ++s) {
      const int begin = min(s * segment_panels, work.panel_end);
      const int end = min(begin + segment_panels, work.panel_end);
      const uint32_t next_scales = load_scales<kDType>(work.item->w, work.row0 + row, end);
      float sums[kN / 2];
      multiply_panels<Tile, kDType, kN>(work, row, scales, begin, end, shared.whole_ring(), place,
                                        sums);
      scales = next_scales;
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) totals[i] = s == 0 ? sums[i] : __fadd_rn(totals[i], sums[i]);
    }
    sm90::barrier_sync(1, Tile::kWarps * 32);  // the sums of the tile before are out
    put_sums<Tile, kN>(shared.sums(), totals);
    sm90::barrier_sync(1, Tile::kWarps * 32);
    constexpr int kFours = Tile::kRows / 4;
    for (int i = thread; i < kN * kFours; i += Tile::kWarps * 32) {
      const int token = i / kFours, row = i % kFours * 4;
      store_rows(*work.item, work.token0 + token, work.row0 + row,
                 *reinterpret_cast<const float4*>(shared.sums() + token * Tile::kSumStride + row));
    }
  }
}

template <typename Tile, int kN>
int number_tiles(Sm90Batch& batch) {
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    Sm90Item& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, Tile::kRows) * ceil_div(item.tokens, kN);
    item.w_map = byte_map(item.w.data, item.w.row_bytes, item.w.rows,
                          item.w.cols * size_of(item.w.dtype), Tile::kRows, true);
    item.x_map = byte_map(item.x, 128, round_up(item.w.cols, 128) / kSm90PanelCols * item.x_rows,
                          128, kN, false);
  }
  return static_cast<int>(tiles);
}

template <DType kDType, int kN>
void launch_segments(Sm90Batch& batch, int segments, cudaStream_t stream) {
  using Tile = Sm90Tile<kDType, kN, false>;
  constexpr int kBytes = static_cast<int>(sizeof(Sm90Shared<Tile, false>));
  static_assert(kBytes * Tile::kBlocksPerSm <= 227 << 10);
  const int tiles = number_tiles<Tile, kN>(batch);
  launch<sm90_linear_segments<kDType, kN>>(
      {dim3(static_cast<unsigned>(tiles * segments)), Tile::kThreads, kBytes,
       static_cast<unsigned>(segments)},
      stream, batch, segments);
}

template <DType kDType, int kN>
void launch_walk(Sm90Batch& batch, cudaStream_t stream) {
  using Tile = Sm90Tile<kDType, kN, true>;
  constexpr int kBytes = static_cast<int>(sizeof(Sm90Shared<Tile, true>));
  static_assert(kBytes <= 227 << 10);
  const int tiles = number_tiles<Tile, kN>(batch);
  launch<sm90_linear_walk<kDType, kN>>(
      {dim3(static_cast<unsigned>(std::min(tiles, batch.most_blocks))), Tile::kThreads, kBytes},
      stream, batch, tiles);
}

template <DType kDType, int kN, bool kSplit, int kRows = 128>
void launch_streams(Sm90Batch& batch, cudaStream_t stream) {
  using Tile = Sm90Streams<kDType, kN, kSplit, kRows>;
  constexpr int kBytes = static_cast<int>(sizeof(Sm90StreamsShared<Tile>));
  static_assert(kBytes <= 227 << 10);
  const int tiles = number_tiles<Tile, kN>(batch) * (kSplit ? 2 : 1);
  const int blocks = kSplit ? tiles : std::min(tiles, batch.most_blocks);
  launch<sm90_linear_streams<kDType, kN, kSplit, kRows>>(
      {dim3(static_cast<unsigned>(blocks)), Tile::kThreads, kBytes, kSplit ? 2 : 1}, stream, batch,
      tiles);
}

// Tiles of 128 rows x `tokens`.
int64_t count_tiles(const Sm90Batch& batch, int tokens) {
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    const Sm90Item& item = batch.items[i];
    tiles += ceil_div(item.w.rows, 128) * ceil_div(item.tokens, tokens);
  }
  return tiles;
}

// `narrow`: 64 rows, where tiles are so few that half of the multiprocessors had no work.
template <int kN>
void launch_streams(Sm90Batch& batch, bool split, bool narrow, cudaStream_t stream) {
  constexpr DType kFp8 = DType::kF8E4M3;
  if (!split) {
    launch_streams<kFp8, kN, false>(batch, stream);
  } else if (narrow) {
    launch_streams<kFp8, kN, true, 64>(batch, stream);
  } else {
    launch_streams<kFp8, kN, true>(batch, stream);
  }
}

// With FP8 weights and up to 128 tokens; false: there are too few tiles for it, or so many that
// tiles of 128 tokens, whose weights are expanded once, are faster.
bool launch_streams_if_good(Sm90Batch& batch, int64_t most_tokens, bool eight_segments,
                            cudaStream_t stream) {
  const int multiprocessors = num_multiprocessors();
  const int tokens = std::min(64, sm90_tile_tokens(most_tokens));
  const int64_t tiles = count_tiles(batch, tokens);
  const bool split = eight_segments && 2 * tiles <= multiprocessors;
  if ((split ? 2 : 1) * tiles * 9 < 4 * multiprocessors || most_tokens > 128 ||
      (most_tokens > 64 && tiles > 2 * multiprocessors))
    return false;
  const bool narrow = split && 4 * tiles <= multiprocessors;
  if (tokens == 16) {
    launch_streams<16>(batch, split, narrow, stream);
  } else if (tokens == 32) {
    launch_streams<32>(batch, split, narrow, stream);
  } else {
    launch_streams<64>(batch, split, narrow, stream);
  }
  return true;
}

template <DType kDType>
void launch_best(Sm90Batch& batch, cudaStream_t stream) {
  // A cluster's size is one number for a launch: the items of a call with fewer segments than the
  // longest leave some of its blocks without work, whose sums nobody adds.
  int segments = 0, fewest_segments = kLinearMaxSegments;
  int64_t most_tokens = 0;
  for (int i = 0; i < batch.count; ++i) {
    const Sm90Item& item = batch.items[i];
    segments = std::max(segments, linear_num_segments(item.w.cols));
    fewest_segments = std::min(fewest_segments, linear_num_segments(item.w.cols));
    most_tokens = std::max<int64_t>(most_tokens, item.tokens);
  }
  if (kDType == DType::kF8E4M3 &&
      launch_streams_if_good(batch, most_tokens, fewest_segments == kLinearMaxSegments, stream))
    return;
  // Whole tiles as soon as they keep half of the multiprocessors busy.
  const int tokens = sm90_tile_tokens(most_tokens);
  const bool walk = count_tiles(batch, tokens) * 9 >= 4 * num_multiprocessors();
  if (tokens == 128) {
    return walk ? launch_walk<kDType, 128>(batch, stream)
                : launch_segments<kDType, 128>(batch, segments, stream);
  }
  if (tokens == 64) {
    if constexpr (kDType == DType::kBf16) {
      if (walk) return launch_walk<kDType, 64>(batch, stream);
    }
    return launch_segments<kDType, 64>(batch, segments, stream);
  }
  if constexpr (kDType == DType::kF8E4M3) {
    if (tokens == 16) return launch_segments<kDType, 16>(batch, segments, stream);
  }
  launch_segments<kDType, 32>(batch, segments, stream);
}

}  // namespace

int sm90_tile_tokens(int64_t tokens) {
  return tokens <= 16 ? 16 : tokens <= 32 ? 32 : tokens <= 64 ? 64 : 128;
}

void launch_linear_sm90(DType w, Sm90Batch& batch, cudaStream_t stream) {
  if (batch.count == 0) return;
  if (w == DType::kF8E4M3) {
    launch_best<DType::kF8E4M3>(batch, stream);
  } else {
    launch_best<DType::kBf16>(batch, stream);
  }
}

}  // namespace dsv4::nvidia
