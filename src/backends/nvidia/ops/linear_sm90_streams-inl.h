// Products of up to 128 tokens on sm_90 whose tiles keep the device busy: two or four streams of
// warpgroups a block. Included by kernels only; see linear_sm90a.cu.
#pragma once
#include "backends/nvidia/ops/linear_sm90-inl.h"

namespace dsv4::nvidia {

/// 128 rows x kN tokens by two streams of two warpgroups, which take every other segment: four
/// warps a scheduler hide what the expansion waits for. Or 64 rows by four streams of one.
/// A thread a stream asks for its copies.
template <DType kDType, int kN, bool kSplit, int kRowsOfTile = 128>
struct Sm90Streams {
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kGroups = kRows / 64;  ///< warpgroups of a stream
  static constexpr int kStreams = 4 / kGroups;
  static constexpr int kWarps = 4 * kGroups;  ///< of a stream
  static constexpr int kMultiplyThreads = 512;
  static constexpr int kThreads = 640;  ///< one more warpgroup copies
  /// Out of 96 a thread, which is what a launch of so many threads gets.
  static constexpr int kCopyRegisters = 32, kMultiplyRegisters = 112;
  static_assert(128 * kCopyRegisters + kMultiplyThreads * kMultiplyRegisters <= kThreads * 96);
  static constexpr bool kReadsWOnce = kN <= 32;  ///< as Sm90Tile
  static constexpr int kPanels = kDType == DType::kF8E4M3 ? 2 : 1;
  static constexpr int kWBytes = kRows * 128;
  static constexpr int kXPanelBytes = kN * 128;
  static constexpr int kStageBytes = kWBytes + kPanels * kXPanelBytes;
  /// Segments whose sums a stream holds at a time, and what their registers leave room for.
  static constexpr int kOwnSegments = kSplit ? kLinearMaxSegments / 2 / kStreams : 1;
  static constexpr bool kReadsAhead = kOwnSegments * kN <= 64;
  static constexpr int kHalves = kDType == DType::kF8E4M3 && kReadsAhead ? 2 : 1;
  /// Sums of 64 rows on their way to the other stream, in the order of the registers, or out,
  /// [token][row]: 4 more floats spread the banks.
  static constexpr int kSumStride = 64 + 4;
  static constexpr int kSlotFloats = kN * kSumStride;
  static constexpr int kBytesLeft = (227 << 10) - kGroups * kSlotFloats * 4 - 512;
  static constexpr int kStages =
      kBytesLeft / (kStreams * kStageBytes) < 6 ? kBytesLeft / (kStreams * kStageBytes) : 6;
  /// Where two blocks share K: parts of a tile's sums, in fours, and the tile on its way out.
  static constexpr int kFours = kRows * kN / 4;
  static constexpr int kTileStride = kRows + 4;
  static_assert(kStages >= 2 && kFours * 4 <= kGroups * kSlotFloats);
  static_assert(4 * kFours * 16 + kN * kTileStride * 4 <= kStreams * kStages * kStageBytes);
};

template <typename Tile>
struct Sm90StreamsShared {
  alignas(1024) std::byte ring[Tile::kStreams][Tile::kStages][Tile::kStageBytes];
  alignas(16) float slots[Tile::kGroups][Tile::kSlotFloats];
  uint64_t full[Tile::kStreams][Tile::kStages], empty[Tile::kStreams][Tile::kStages];
  uint64_t turns[Tile::kGroups][Tile::kStreams];  ///< a stream may touch a group's slot
  uint64_t handed_over;                           ///< the first block's sums have come
};

/// A block's segments of a tile: `count` from `first` on.
struct Sm90Segments {
  int first, count, panels, panel_end;
  __device__ __forceinline__ int begin(int s) const { return min((first + s) * panels, panel_end); }
  __device__ __forceinline__ int end(int s) const {
    return min((first + s + 1) * panels, panel_end);
  }
};

template <bool kSplit>
__device__ __forceinline__ Sm90Segments find_segments(const Sm90Work& work, int rank) {
  const int segments = linear_num_segments(work.item->w.cols);
  return {.first = kSplit ? rank * (kLinearMaxSegments / 2) : 0,
          .count = kSplit ? kLinearMaxSegments / 2 : segments,
          .panels = sm90_segment_panels(work.item->w.cols),
          .panel_end = work.panel_end};
}

/// Asks for the stages of a stream of a tile; one thread calls. `first` as in copy_tile.
template <typename Tile, typename Shared, typename Place>
__device__ __forceinline__ void copy_stream(const Sm90Work& work, const Sm90Segments& segments,
                                            int stream, bool first, Shared& shared, Place& place) {
  const Sm90Item& item = *work.item;
  const uint32_t full = sm80::shared_address(shared.full[stream]);
  const uint32_t empty = sm80::shared_address(shared.empty[stream]);
  const uint32_t ring = sm80::shared_address(shared.ring[stream]);
  const auto ask_for_w = [&](int panel, int stage) {
    sm90::mbarrier_arrive_expecting(full + stage * 8, Tile::kStageBytes);
    sm90::copy_box<Tile::kReadsWOnce>(ring + stage * Tile::kStageBytes, item.w_map,
                                      panel / Tile::kPanels * 128, work.row0, full + stage * 8);
  };
  int early = 0;
  if (first) {
    int panel = stream < segments.count ? segments.begin(stream) : 0;
    const int end = stream < segments.count ? segments.end(stream) : 0;
#pragma unroll 1
    for (; early < Tile::kStages && panel < end; ++early, panel += Tile::kPanels)
      ask_for_w(panel, early);
    sm90::wait_for_kernels_before();
  }
#pragma unroll 1
  for (int s = stream; s < segments.count; s += Tile::kStreams) {
    const int end = segments.end(s);
#pragma unroll 1
    for (int panel = segments.begin(s); panel < end; panel += Tile::kPanels) {
      if (early > 0) {
        --early;
      } else {
        sm90::mbarrier_wait(empty + place.stage * 8, place.phase ^ 1);
        ask_for_w(panel, place.stage);
      }
      const uint32_t to = ring + place.stage * Tile::kStageBytes + Tile::kWBytes;
#pragma unroll
      for (int p = 0; p < Tile::kPanels; ++p) {
        sm90::copy_box(to + p * Tile::kXPanelBytes, item.x_map, 0,
                       static_cast<int>((panel + p) * item.x_rows) + work.token0,
                       full + place.stage * 8);
      }
      place.advance();
    }
  }
}

/// Rows `row`.. of a tile, `sums` [token][kStride], by `threads` threads.
template <int kN, int kRows, int kStride>
__device__ __forceinline__ void store_sums(const Sm90Work& work, int row, const float* sums,
                                           int thread, int threads) {
  constexpr int kFours = kRows / 4;
  for (int i = thread; i < kN * kFours; i += threads) {
    const int token = i / kFours, of_tile = i % kFours * 4;
    store_rows(*work.item, work.token0 + token, work.row0 + row + of_tile,
               *reinterpret_cast<const float4*>(sums + token * kStride + of_tile));
  }
}

__device__ __forceinline__ float4 add_fours(const float4& a, const float4& b) {
  return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w)};
}

/// Whole tiles, one after the other. A tile's sums go from segment to segment, that is from stream
/// to stream, through a slot.
template <DType kDType, int kN>
__device__ __forceinline__ void multiply_tiles(
    const Sm90Batch& batch, int tiles, Sm90StreamsShared<Sm90Streams<kDType, kN, false>>& shared) {
  using Tile = Sm90Streams<kDType, kN, false>;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int group = warp_of_block() / 4 % 2, stream = warp_of_block() / 8;
  const uint32_t turn = sm80::shared_address(&shared.turns[group][stream]);
  const uint32_t turn_of_other = sm80::shared_address(&shared.turns[group][1 - stream]);
  uint32_t turn_phase = 0;
  const int own = 1 + 2 * group + stream;  // barrier of this warpgroup
  float* slot = shared.slots[group];
  float4* fours = reinterpret_cast<float4*>(slot) + thread;
  const Sm90Ring ring =
      make_ring<Tile>(shared.ring[stream], shared.full[stream], shared.empty[stream]);
  sm90::RingPlace<Tile::kStages> place;
  bool other_before = false;  // was it the other stream that used the slot last?
  const auto step = static_cast<int>(gridDim.x);
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += step) {
    const Sm90Work work = find_work<Tile, kN>(batch, tile);
    const Sm90Segments segments = find_segments<false>(work, 0);
    const int row = 64 * group;
    uint32_t scales = load_scales<kDType>(work.item->w, work.row0 + row, segments.begin(stream));
    for (int s = stream; s < segments.count; s += Tile::kStreams) {
      const uint32_t next_scales =
          load_scales<kDType>(work.item->w, work.row0 + row, segments.begin(s + Tile::kStreams));
      float sums[kN / 2];
      multiply_panels<Tile, kDType, kN>(work, row, scales, segments.begin(s), segments.end(s), ring,
                                        place, sums);
      scales = next_scales;
      if (s > 0 || other_before) {
        sm90::mbarrier_wait(turn, turn_phase);
        turn_phase ^= 1;
      }
      if (s > 0) {
#pragma unroll
        for (int i = 0; i < kN / 8; ++i) {
          const float4 before = fours[i * 128];
          sums[4 * i] = __fadd_rn(before.x, sums[4 * i]);
          sums[4 * i + 1] = __fadd_rn(before.y, sums[4 * i + 1]);
          sums[4 * i + 2] = __fadd_rn(before.z, sums[4 * i + 2]);
          sums[4 * i + 3] = __fadd_rn(before.w, sums[4 * i + 3]);
        }
      }
      const bool last = s + 1 == segments.count;
      if (last) {
        sm90::barrier_sync(own, 128);  // all have read
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          const int token = i / 4 * 8 + 2 * (thread % 4) + i % 2;
          slot[token * Tile::kSumStride + thread / 32 * 16 + row_of_lane() + i / 2 % 2 * 8] =
              sums[i];
        }
        sm90::barrier_sync(own, 128);
        store_sums<kN, 64, Tile::kSumStride>(work, row, slot, thread, 128);
      } else {
#pragma unroll
        for (int i = 0; i < kN / 8; ++i)
          fours[i * 128] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
      }
      if (!last || stream == 1) {
        sm90::mbarrier_arrive(turn_of_other);
      } else {
        sm90::barrier_sync(own, 128);  // the slot is read; the next turn is this stream's
      }
    }
    other_before = segments.count % 2 == 0;
  }
}

/// A tile whose eight segments two blocks share: the first adds up its four, the second takes their
/// sum and adds its own.
template <typename Tile, DType kDType, int kN>
__device__ __forceinline__ void multiply_split(const Sm90Work& work, const Sm90Segments& segments,
                                               int rank, Sm90StreamsShared<Tile>& shared) {
  constexpr int kThreads = Tile::kMultiplyThreads, kStreams = Tile::kStreams;
  constexpr int kOwn = Tile::kOwnSegments;
  const auto thread = static_cast<int>(threadIdx.x);
  const int group = warp_of_block() / 4 % Tile::kGroups, stream = warp_of_block() / Tile::kWarps;
  const int row = 64 * group;
  const Sm90Ring ring =
      make_ring<Tile>(shared.ring[stream], shared.full[stream], shared.empty[stream]);
  sm90::RingPlace<Tile::kStages> place;
  uint32_t scales[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    scales[i] =
        load_scales<kDType>(work.item->w, work.row0 + row, segments.begin(stream + i * kStreams));
  }
  float sums[kOwn][kN / 2];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int s = stream + i * kStreams;
    multiply_panels<Tile, kDType, kN>(work, row, scales[i], segments.begin(s), segments.end(s),
                                      ring, place, sums[i]);
  }
  const uint32_t handed_over = sm80::shared_address(&shared.handed_over);
  if (thread == 0 && rank == 1) sm90::mbarrier_arrive_expecting(handed_over, Tile::kFours * 16);
  sm90::barrier_sync(1, kThreads);  // the rings are empty: they take the sums
  float4* parts = reinterpret_cast<float4*>(shared.ring);  // [segment][group][kN / 8][thread]
  constexpr int kFoursOfGroup = Tile::kFours / Tile::kGroups;
  float4* own = parts + stream * Tile::kFours + group * kFoursOfGroup + thread % 128;
#pragma unroll
  for (int s = 0; s < kOwn; ++s) {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
      own[s * kStreams * Tile::kFours + i * 128] = {sums[s][4 * i], sums[s][4 * i + 1],
                                                    sums[s][4 * i + 2], sums[s][4 * i + 3]};
    }
  }
  sm90::barrier_sync(1, kThreads);
  if (rank == 0) {
    sm90::cluster_wait();  // the other block is there: it has said so at its start
    const uint32_t to = sm90::cluster_address(shared.slots, 1);
    const uint32_t barrier = sm90::cluster_address(&shared.handed_over, 1);
#pragma unroll
    for (int i = thread; i < Tile::kFours; i += kThreads) {
      float4 sum = parts[i];
#pragma unroll
      for (int s = 1; s < 4; ++s) sum = add_fours(sum, parts[i + s * Tile::kFours]);
      sm90::cluster_store_async(to + i * 16, sum.x, sum.y, sum.z, sum.w, barrier);
    }
    return;
  }
  const float4* before = reinterpret_cast<const float4*>(shared.slots);
  float* out = reinterpret_cast<float*>(parts + 4 * Tile::kFours);  // [token][row]
  sm90::mbarrier_wait(handed_over, 0);
#pragma unroll
  for (int i = thread; i < Tile::kFours; i += kThreads) {
    float4 sum = before[i];
#pragma unroll
    for (int s = 0; s < 4; ++s) sum = add_fours(sum, parts[i + s * Tile::kFours]);
    const int token = i / 128 % (kN / 8) * 8 + i % 4 * 2;
    const int of_tile = i / kFoursOfGroup * 64 + i / 32 % 4 * 16 + row_of_lane();
    float* to = out + token * Tile::kTileStride + of_tile;
    to[0] = sum.x, to[Tile::kTileStride] = sum.y;
    to[8] = sum.z, to[Tile::kTileStride + 8] = sum.w;
  }
  sm90::barrier_sync(1, kThreads);
  store_sums<kN, Tile::kRows, Tile::kTileStride>(work, 0, out, thread, kThreads);
  sm90::cluster_wait();
}

template <DType kDType, int kN, bool kSplit, int kRows>
__global__ void __launch_bounds__(Sm90Streams<kDType, kN, kSplit, kRows>::kThreads, 1)
    sm90_linear_streams(const __grid_constant__ Sm90Batch batch, int tiles) {
  using Tile = Sm90Streams<kDType, kN, kSplit, kRows>;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<Sm90StreamsShared<Tile>*>(raw);
  if (threadIdx.x == 0) {
    for (int stream = 0; stream < Tile::kStreams; ++stream) {
      for (int s = 0; s < Tile::kStages; ++s) {
        sm90::mbarrier_init(sm80::shared_address(&shared.full[stream][s]), 1);
        sm90::mbarrier_init(sm80::shared_address(&shared.empty[stream][s]), Tile::kWarps);
      }
    }
    for (auto& turns : shared.turns) {
      for (uint64_t& turn : turns) sm90::mbarrier_init(sm80::shared_address(&turn), 128);
    }
    sm90::mbarrier_init(sm80::shared_address(&shared.handed_over), 1);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  if constexpr (kSplit) sm90::cluster_arrive_relaxed();
  const int rank = kSplit ? static_cast<int>(sm90::cluster_rank()) : 0;
  if (threadIdx.x >= Tile::kMultiplyThreads) {
    take_copy_role<Tile>();
    const int stream = warp_of_block() - Tile::kMultiplyThreads / 32;
    if (stream < Tile::kStreams && threadIdx.x % 32 == 0) {
      sm90::RingPlace<Tile::kStages> place;
      const auto first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
      for (int tile = first; tile < tiles; tile += step) {
        const Sm90Work work = find_work<Tile, kN>(batch, kSplit ? tile / 2 : tile);
        copy_stream<Tile>(work, find_segments<kSplit>(work, rank), stream, tile == first, shared,
                          place);
      }
      sm90::start_next_kernel();  // not sooner: what it asks for would stand in front of W
    }
    if constexpr (kSplit) {
      __syncwarp();
      sm90::cluster_wait();
    }
    return;
  }
  take_multiply_role<Tile>();
  if constexpr (kSplit) {
    const Sm90Work work = find_work<Tile, kN>(batch, static_cast<int>(blockIdx.x) / 2);
    multiply_split<Tile, kDType, kN>(work, find_segments<true>(work, rank), rank, shared);
  } else {
    multiply_tiles<kDType, kN>(batch, tiles, shared);
  }
}

}  // namespace dsv4::nvidia
