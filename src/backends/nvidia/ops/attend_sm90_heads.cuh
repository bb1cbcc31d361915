// sm90_attend_heads: one token x up to 16 (32) heads against a chain of row blocks.
//
// Problem   attend.h; rows of 512 dims, blocks of 64 rows
// Tiling    item = (token, chain), dealt out to persistent CTAs, first chains first, whole or block
//           by block (attend_sm90_heads_deal.cuh). Rows of keys and columns of values are the long
//           side of the products, heads the short one. Four warpgroups:
//             0, 1  even and odd blocks: fetch, convert, S^T = K Q^T [64 x heads] with K in
//                   registers as it comes from the conversion, softmax, P; rows and P to shared
//                   memory (attend_sm90_heads_rows.cuh)
//             2     O^T[512 x heads] += V^T P^T, epilogue
//             3     two warps say where rows lie, two load halves of queries
// Budget    a block and 16 heads: 64 x 584 B = 37 KB; shared memory: rows in and out 74 KB, tile
//           written and read 128 KB, query 16 KB = 1700 clocks; about 1000 instructions a warp of a
//           rows role. Limits and measurements: docs/kernels/attend_sm90_heads.md
// Launch    min(items, SMs) CTAs of 512 threads, smem = sizeof(SharedStorage), 1 CTA/SM
// Contract  as sm90_attend: q, out, rows 16-byte aligned; masked rows are never read and contribute
//           exactly nothing: their tile rows are zeros, their P is 0; a token without rows gets 0
//           and lse -inf; bits depend on the token's own rows only
// Numerics  as sm90_attend, and the same bits: f32 sums, p rounded to bf16, sums of unrounded p, a
//           reference maximum that moves only when the true one has grown by more than 2^8
#pragma once
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_heads.h"
#include "backends/nvidia/ops/attend_sm90_heads_deal.cuh"
#include "backends/nvidia/ops/attend_sm90_heads_rows.cuh"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia::sm90_attend_heads {

constexpr int kOutputBarrier = 3;  // named, within the output role; 1 and 2: within rows roles

// ---- walk: where the rows of coming blocks lie

// What is known of a row before its place has come: the row of its page, or kListRow where the
// place is a slot; kCompressedRow tells the source; kNoRow: masked.
constexpr int kNoRow = -1;
constexpr int kCompressedRow = 1 << 30;
constexpr int kListRow = kCompressedRow - 1;

/// Asks for the place of row `place` of a source, in 4 bytes at `to`; what is known of it.
__device__ __forceinline__ int fetch_place(const AttendSm90Args& args, const TokenBlocks& token,
                                           int token_idx, bool compressed, int place, uint32_t to) {
  const RowSource& rows = compressed ? args.attend.compressed : args.attend.window;
  const int begin = compressed ? token.compressed_begin : token.window_begin;
  const int end = compressed ? token.compressed_end : token.window_end;
  if (place < begin || place >= end) return kNoRow;
  const int32_t* from = rows.slots + token_idx * rows.slots_stride + place;
  int known = kListRow;
  if (rows.kind == RowSource::kRange) {
    const FastDivisor& by_rows = compressed ? args.compressed_rows : args.window_rows;
    const FastDivisor& by_columns = compressed ? args.compressed_columns : args.window_columns;
    const int block = by_rows.divide(place);
    from = rows.table + token.seq * rows.table_stride + block -
           by_columns.divide(block) * by_columns.divisor;
    known = place - block * by_rows.divisor;
  }
  copy_async_4(to, from, 4);
  return compressed ? known | kCompressedRow : known;
}

/// RowAddress of a row whose place has come.
template <typename Traits>
__device__ __forceinline__ uint64_t address_of(const AttendSm90Args& args, int place, int known) {
  if (known < 0 || place < 0) return 0;
  const bool compressed = (known & kCompressedRow) != 0;
  const RowSource& rows = compressed ? args.attend.compressed : args.attend.window;
  int block = place, row = known & kListRow;
  if (row == kListRow) {
    const FastDivisor& by_rows = compressed ? args.compressed_rows : args.window_rows;
    block = by_rows.divide(place);
    row = place - block * by_rows.divisor;
  }
  return RowAddress::in_page<Traits>(rows, block, row).bits;
}

/// Two warps, each for the blocks of one rows role, a thread for two rows. Of the first two blocks
/// of a role, places are asked for together; later, a rows role is blocks behind.
template <typename Traits>
__device__ __forceinline__ void walk_role(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                          int role, int lane) {
  constexpr int kSlots = Traits::kAddressSlots;
  const Share share = shared.share;
  Item item{share.begin - share.stride, 0, 0};
  TokenBlocks token{};
  ChainBlocks chain{};
  uint32_t item_flags = kOddItem;
  int inside = 0, stop = 1;  // block of the item, block after the last one of the share
  const auto publish = [&](int slot) {
#pragma unroll
    for (int row = lane; row < kBlockRows; row += 32) {
      const uint32_t at = shared_address(&shared.addresses[slot][row]);
      const uint2 place = load_shared_2(at);
      const uint64_t address =
          address_of<Traits>(args, static_cast<int>(place.x), static_cast<int>(place.y));
      store_shared_2(at, static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32));
    }
    mbarrier_arrive(shared_address(&shared.barriers.known[slot]));
  };
  bool exists = true, waits = false;  // the role's first block waits for its second
  for (int block = 0;; ++block) {
    const bool starts = exists && ++inside >= stop;
    if (starts) {
      if (waits) {  // not for the numbers of another item
        copy_async_wait<0>();
        publish(role);
        waits = false;
      }
      item = next_item(args, share, item.index);
      inside = 0;
      exists = item.index >= 0;
      if (exists) {
        token = token_blocks<kBlockRows>(args.attend, item.token);
        if (item.index + share.stride < share.end) {
          ask_for_numbers(args, item_of(args, item.index + share.stride).token, lane);
        }
        chain = chain_blocks(args.attend, token, item.chain);
        stop = max(chain.count, 1);  // a token without rows has one block of none
        item_flags = (item_flags ^ kOddItem) & kOddItem;
        if (token.compressed_last <= args.attend.blocks_per_chain) item_flags |= kOnlyChain;
        if (share.last_blocks > 0 && item.index + 1 == share.end) {
          inside = stop - share.last_blocks;
          item_flags |= kTakenOver;
        }
        if (share.first_blocks > 0 && item.index == share.begin) {
          stop = share.first_blocks;
          item_flags |= kHandedOver;
        }
      }
    }
    if ((block & 1) != role) continue;
    const int slot = block % kSlots;
    if (block >= kSlots) {
      mbarrier_poll(shared_address(&shared.barriers.freed[slot]), phase_of<kSlots>(block) ^ 1);
    }
    const bool has_rows = exists && inside < chain.count, window = inside < chain.window_blocks;
    const int first = first_place(args.attend, token, chain, inside);
#pragma unroll
    for (int row = lane; row < kBlockRows; row += 32) {
      const uint32_t at = shared_address(&shared.addresses[slot][row]);
      const int known =
          has_rows ? fetch_place(args, token, item.token, !window, first + row, at) : kNoRow;
      store_shared(at + 4, static_cast<uint32_t>(known));
    }
    copy_async_commit();
    if (lane == 0) {
      shared.headers[block % Traits::kHeaderSlots] = {
          exists ? item.token : -1, static_cast<uint16_t>(item.chain),
          static_cast<uint16_t>(item_flags | (starts ? kFirstBlock : 0u) |
                                (inside + 1 == stop ? kLastBlock : 0u) |
                                (inside + 2 >= stop ? kLastOfRole : 0u))};
    }
    if (block < 2 && exists) {
      waits = true;
      continue;
    }
    if (waits) {
      copy_async_wait<1>();
      publish(role);
      waits = false;
    }
    copy_async_wait<0>();
    publish(slot);
    if (!exists) return;  // the block that ends the rows role
  }
}

// ---- query

/// Columns of a query for the operand of S^T: see RowsOfWarp. Two warps; each has half of the
/// panels. Heads past the last one are copies of it; nobody stores what becomes of them. One of
/// them also waits for the item that is taken over.
template <typename Traits>
__device__ __forceinline__ void query_role(const AttendSm90Args& args, const HandOvers& hand_overs,
                                           SharedStorage<Traits>& shared, int warp, int lane) {
  constexpr int kHeadGroups = Traits::kHeads / 8;
  const int quad = lane & 3;
  uint32_t phase = 0;
  bool first = true;
  const Share share = shared.share;
  if (args.starts_early) follow_kernels_before();
  for (Item item{share.begin - share.stride, 0, 0};;) {
    item = next_item(args, share, item.index);
    if (item.index < 0) return;
#pragma unroll
    for (int half = 0; half < kHeadGroups; half += 2) {  // 16 heads at a time
      uint32_t values[4][2][2][4];                       // panel, group of 8 heads, columns
      const uint16_t* q = args.attend.q + item.token * args.attend.q_token_stride;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const int head = min((half + group) * 8 + (lane >> 2), args.attend.num_heads - 1);
        const uint16_t* of_head = q + head * args.attend.q_head_stride;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            load_global_constant_16(of_head + (warp * 4 + i) * 64 + 16 * quad + 8 * upper,
                                    values[i][group][upper]);
          }
        }
      }
      if (half == 0 && !first) {
        mbarrier_poll(shared_address(&shared.barriers.query_empty[warp]), phase);
        phase ^= 1;
      }
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const int head = (half + group) * 8 + (lane >> 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t to = shared_address(shared.query[warp * 4 + i]) + head * 128 +
                              ((2 * quad ^ (head & 7)) << 4);
          const uint32_t(&x)[2][4] = values[i][group];
          const bool wide = warp * 4 + i >= Traits::kFp8Panels;
          store_shared_4(to, x[0][0], wide ? x[0][1] : x[0][2], wide ? x[0][2] : x[1][0],
                         wide ? x[0][3] : x[1][2]);
          store_shared_4(to ^ 16, wide ? x[1][0] : x[0][1], wide ? x[1][1] : x[0][3],
                         wide ? x[1][2] : x[1][1], x[1][3]);
        }
      }
    }
    first = false;
    fence_proxy_async();
    mbarrier_arrive(shared_address(&shared.barriers.query_full[warp]));
    if (warp == 0 && share.last_blocks > 0 && item.index + 1 == share.end) {
      wait_for_item<Traits>(hand_overs, lane, shared.taken_over);
      mbarrier_arrive(shared_address(&shared.barriers.taken_over));
    }
  }
}

// ---- output

/// A sum of weights has four parts (store_sums): the one that a thread adds up, of head lane %
/// kHeads. With 16 heads, warps 2 and 3 do what 0 and 1 do.
template <typename Traits>
__device__ __forceinline__ int part_of_thread(int warp, int lane) {
  return Traits::kHeads == 32 ? warp : (warp & 1) * 2 + (lane >> 4);
}

/// What is left of an item: all dims, warp by warp 16 of every 64, of all heads; `sink` is that of
/// head lane % kHeads, `sum_of_part`: see part_of_thread. Gives back the last part of the tile.
template <typename Traits>
__device__ __forceinline__ void store_item(const AttendSm90Args& args,
                                           SharedStorage<Traits>& shared, const BlockHeader& header,
                                           int block, int warp, int lane, float sink,
                                           float sum_of_part,
                                           const float (&o)[8][Traits::kHeads / 2]) {
  constexpr int kHeads = Traits::kHeads, kFp8Panels = Traits::kFp8Panels;
  const AttendArgs& attend = args.attend;
  const int stage = block & 1, quad = lane & 3, my_head = lane % kHeads;
  const auto last = TilePart<Traits>::last_of(block);
  auto& parts = shared.item_sums(stage);
  if (kHeads == 32 || warp < 2) parts[part_of_thread<Traits>(warp, lane)][my_head] = sum_of_part;
  barrier_sync(kOutputBarrier, 128);  // and the tile has been used up
  const float sum =
      (parts[0][my_head] + parts[1][my_head]) + (parts[2][my_head] + parts[3][my_head]);
  const float max = shared.reference[stage][my_head];
  const bool any = sum != 0.f;  // or NaN
  const uint32_t empty = shared_address(&shared.barriers.empty[last.slot]);
  if ((header.flags & kOnlyChain) == 0) {
    mbarrier_arrive(empty);
    const int64_t slot = static_cast<int64_t>(header.token) * attend.max_chains + header.chain;
    if (warp == 0 && lane < kHeads) {
      args.chains.sums[slot * kHeads + my_head] = make_float2(any ? max : -INFINITY, sum);
    }
    store_values<kHeads>(args.chains.values + slot * kHeads * 128 + warp * 32 + lane, o);
    return;
  }

  float factor = 0.f;
  if (my_head < attend.num_heads) {
    if (any) factor = inverse_denominator(max, sum, sink);
    if (warp == 0 && lane < kHeads && attend.lse != nullptr) {
      attend.lse[static_cast<int64_t>(header.token) * attend.num_heads + my_head] =
          any ? log_sum_exp(max, sum) : -INFINITY;
    }
  }
  float factors[kHeads / 4];
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) {
    factors[i] = __shfl_sync(~0u, factor, i / 2 * 8 + 2 * quad + i % 2);
  }
  // Through the last part of the tile: by head, 1 KB, 16-byte units mixed with the head.
  const uint32_t staged = shared_address(shared.rows[last.slot]);
  static_assert(kHeads * 1024 <= sizeof(shared.rows[0]));
  const uint32_t to = staged + (lane >> 4) * 8192 + (lane & 7) * 1024 +
                      (((2 * warp + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
#pragma unroll
  for (int panel = 0; panel < 8; ++panel) {
#pragma unroll
    for (int n = 0; n < kHeads / 8; n += 2) {
      const float* of = o[panel] + 4 * n;
      const float* by = factors + 2 * n;
      store_matrix_4_transposed(
          to + n * 8192 + panel * 128, pack_bf16x2(of[0] * by[0], of[1] * by[1]),
          pack_bf16x2(of[2] * by[0], of[3] * by[1]), pack_bf16x2(of[4] * by[2], of[5] * by[3]),
          pack_bf16x2(of[6] * by[2], of[7] * by[3]));
    }
  }
  barrier_sync(kOutputBarrier, 128);
  // Eight lanes have a panel of a head, 8 columns each: a unit of it, or halves of two
  // (RowsOfWarp).
  uint16_t* out = attend.out + header.token * attend.out_token_stride + warp * 128 + (lane & 7) * 8;
#pragma unroll 1
  for (int head = lane >> 3; head < attend.num_heads; head += 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int panel = 2 * warp + i;
      const uint32_t from = staged + head * 1024 + panel * 128;
      const bool wide = panel >= kFp8Panels;
      const int unit = wide ? lane & 7 : lane & 6;
      const uint32_t low = from + ((unit ^ (head & 7)) << 4);
      const uint2 first = load_shared_2(low + (wide ? 0 : (lane & 1) * 8));
      const uint2 second = load_shared_2(wide ? low + 8 : (low ^ 16) + (lane & 1) * 8);
      *reinterpret_cast<uint4*>(out + head * attend.out_head_stride + i * 64) =
          wide ? make_uint4(first.x, first.y, second.x, second.y)
               : make_uint4(first.x, second.x, first.y, second.y);
    }
  }
  mbarrier_arrive(empty);
}

template <typename Traits>
__device__ __forceinline__ void output_role(const AttendSm90Args& args, const HandOvers& hand_overs,
                                            SharedStorage<Traits>& shared, int warp, int lane) {
  constexpr int kHeads = Traits::kHeads;
  const int my_head = lane % kHeads, quad = lane & 3, part = part_of_thread<Traits>(warp, lane);
  float sink = -INFINITY;  // asked for now: an item's end would wait for memory
  if (args.attend.sink != nullptr && my_head < args.attend.num_heads) {
    sink = __ldg(args.attend.sink + my_head);
  }
  if (args.starts_early) sm90::wait_for_kernels_before();
  const auto wait_for = [&](int block) {
    mbarrier_poll(shared_address(&shared.barriers.full[block & 1]), phase_of<2>(block));
    return read_header(shared.headers[block % Traits::kHeaderSlots]);
  };
  for (int block = 0;; ++block) {
    float o[8][kHeads / 2];  // by panel; o[p][4 n ...] as scores: columns instead of rows
#pragma unroll
    for (int i = 0; i < 8 * (kHeads / 2); ++i) o[i / (kHeads / 2)][i % (kHeads / 2)] = 0.f;
    float sum = 0.f;
    BlockHeader header = wait_for(block);
    if (header.token < 0) return;
    bool begins = true;
    if (__any_sync(~0u, (header.flags & kTakenOver) != 0)) {
      take_over<Traits>(hand_overs, warp * 32 + lane, sum, o);
      begins = false;
    }
    while (true) {
      const int stage = block & 1;
      const float alpha = begins ? 1.f : shared.alpha[stage][my_head];
      begins = false;
      float block_sum = shared.sums[stage][0][part][my_head];
#pragma unroll
      for (int w = 1; w < 4; ++w) block_sum += shared.sums[stage][w][part][my_head];
      sum = __fmaf_rn(sum, alpha, block_sum);
      if (__any_sync(~0u, alpha != 1.f)) {
#pragma unroll
        for (int i = 0; i < kHeads / 4; ++i) {
          const float by = __shfl_sync(~0u, alpha, i / 2 * 8 + 2 * quad + i % 2);
          const int at = 4 * (i / 2) + i % 2;
#pragma unroll
          for (int panel = 0; panel < 8; ++panel) {
            o[panel][at] *= by;
            o[panel][at + 2] *= by;
          }
        }
      }
      const uint64_t p = swizzled_operand(shared_address(shared.p[stage]), 16, 1024);
      constexpr int kParts = Traits::kTileParts;
      uint32_t empty[kParts];
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const TilePart<Traits> tile(block, part);
        empty[part] = shared_address(&shared.barriers.empty[tile.slot]);
        const uint64_t values =
            swizzled_operand(shared_address(shared.rows[tile.slot]), Traits::kPanelBytes, 1024);
#pragma unroll
        for (int panel = 0; panel < Traits::kPartPanels; ++panel) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            TransposedProduct<kHeads>::run(
                o[part * Traits::kPartPanels + panel],
                values + operand_offset(panel * Traits::kPanelBytes + k * 2048),
                p + operand_offset(k * 32));
          }
        }
        wgmma_commit();
      }
      if constexpr (kParts == 4) {
        wgmma_wait<3>();
        mbarrier_arrive(empty[0]);
        wgmma_wait<2>();
        mbarrier_arrive(empty[1]);
      }
      wgmma_wait<1>();
      mbarrier_arrive(empty[kParts - 2]);
      wgmma_wait<0>();
      if (__any_sync(~0u, (header.flags & kLastBlock) != 0)) break;
      mbarrier_arrive(empty[kParts - 1]);
      header = wait_for(++block);
    }
    if (__any_sync(~0u, (header.flags & kHandedOver) != 0)) {
      hand_over(hand_overs, shared, block, kOutputBarrier, warp * 32 + lane, sum, o);
    } else {
      store_item(args, shared, header, block, warp, lane, sink, sum, o);
    }
  }
}

/// From the 128 that a thread is launched with.
template <int kRegisters>
__device__ __forceinline__ void set_registers() {
  if constexpr (kRegisters > 128) {
    increase_registers<kRegisters>();
  } else if constexpr (kRegisters < 128) {
    decrease_registers<kRegisters>();
  }
}

/// By one thread.
template <typename Traits>
__device__ __forceinline__ void init_barriers(Barriers<Traits>& barriers) {
  for (int i = 0; i < Traits::kAddressSlots; ++i) {
    mbarrier_init(shared_address(&barriers.known[i]), 32);
    mbarrier_init(shared_address(&barriers.freed[i]), 128);
  }
  mbarrier_init(shared_address(&barriers.taken_over), 32);
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(shared_address(&barriers.query_full[i]), 32);
    mbarrier_init(shared_address(&barriers.query_empty[i]), 256);
    mbarrier_init(shared_address(&barriers.reference_known[i]), 128);
    mbarrier_init(shared_address(&barriers.full[i]), 128);
  }
  for (uint64_t& empty : barriers.empty) mbarrier_init(shared_address(&empty), 128);
}

/// Into the L2, while the kernel before may still run, what is read first: numbers and list of the
/// first item by one role, its query by another. Of blocks that are dealt out, of the item that
/// would be the first if all were equally long.
template <typename Traits>
__device__ __forceinline__ void prefetch_first(const AttendSm90Args& args, bool deals, int role,
                                               int thread) {
  int item = static_cast<int>(blockIdx.x);
  if (deals) {
    const int num_ctas = static_cast<int>(gridDim.x);
    item = (num_ctas - 1 - item) * args.num_items / num_ctas;
  }
  const int token = item_of(args, item).token;
  if (role == 3) {
    sm90_attend::prefetch_lists(args, token, thread);
    sm90_attend::prefetch_window<Traits, 1>(args, token, 0, thread);
  }
  if (role != 2) return;
  const AttendArgs& attend = args.attend;
  constexpr int kLine = 64, kLines = Traits::kHeadDim / kLine;  // values of 128 bytes
  for (int head = thread / kLines; head < attend.num_heads; head += 128 / kLines) {
    prefetch_l2(attend.q + token * attend.q_token_stride + head * attend.q_head_stride +
                thread % kLines * kLine);
  }
  if (thread == 0 && attend.sink != nullptr) prefetch_l2(attend.sink);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_kernel(const __grid_constant__ AttendSm90Args args,
                  const __grid_constant__ HandOvers hand_overs) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(storage);
  const int warp_of_cta = uniform(static_cast<int>(threadIdx.x) >> 5);
  const int role = warp_of_cta >> 2, warp = warp_of_cta & 3;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (threadIdx.x == 0) init_barriers(shared.barriers);
  prefetch_first<Traits>(args, hand_overs.items != nullptr, role, warp * 32 + lane);
  // Ranges are known sooner than rows and queries: then each role waits when it has found its own.
  if (!args.starts_early) follow_kernels_before();
  if (hand_overs.items != nullptr) {
    count_blocks(args, shared);
    __syncthreads();
  }
  if (role == 3 && warp == 0) {
    if (hand_overs.items != nullptr) {
      deal_blocks(args, shared);
    } else {
      ask_for_numbers(args, item_of(args, static_cast<int>(blockIdx.x)).token, lane);
      if (lane == 0) shared.share = share_of_items(args);
    }
  }
  __syncthreads();
  if (role == 3) {
    set_registers<Traits::kWalkRegisters>();
    if (warp < 2) {
      walk_role(args, shared, warp, lane);
    } else {
      query_role(args, hand_overs, shared, warp - 2, lane);
    }
  } else if (role == 2) {
    set_registers<Traits::kOutputRegisters>();
    output_role(args, hand_overs, shared, warp, lane);
  } else {
    set_registers<Traits::kRowsRegisters>();
    rows_role(args, shared, role, warp, lane);
  }
}

}  // namespace dsv4::nvidia::sm90_attend_heads

namespace dsv4::nvidia {

template <KvFormat kFormat, int kHeads>
void launch_attend_sm90_heads(const AttendSm90Args& args, const HandOvers& hand_overs, int grid,
                              cudaStream_t stream) {
  const auto run = [&]<typename Traits>() {
    launch<sm90_attend_heads::attend_kernel<Traits>>(
        {dim3(static_cast<unsigned>(grid)), Traits::kThreads,
         sizeof(sm90_attend_heads::SharedStorage<Traits>)},
        stream, args, hand_overs);
  };
  if constexpr (kFormat == KvFormat::kFp8DsMla && kHeads == 16) {
    if (args.attend.max_blocks == 0) {
      return run.template operator()<sm90_attend_heads::Traits<kFormat, kHeads, true>>();
    }
  }
  run.template operator()<sm90_attend_heads::Traits<kFormat, kHeads>>();
}

}  // namespace dsv4::nvidia
