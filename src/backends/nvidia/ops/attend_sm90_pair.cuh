// sm90_attend_pair: sm90_attend for calls of few items, which two CTAs share.
//
// Problem   as sm90_attend, and the same bits: every sum has the same terms in the same order
// Tiling    item = (token, 64 heads, chain), for a cluster of two CTAs. CTA r has rows 32 r ...
//           of every block and columns 256 r ... of the output. Four warpgroups:
//             0  S [64 x 32] of its rows, half of S to the other CTA and half from there, then the
//                whole softmax, twice in the pair. S of the next block runs meanwhile
//             1  O[64 x 256] += P V
//             2  one warp finds the rows
//             3  gathers and converts its 32 rows; a copy of the other CTA's columns goes there
//           Three stages. The query lives in registers.
// Budget    a block: 2 x 512 clocks of wgmma, conversion of 32 rows, 8 KB of S and 16 KB of rows
//           sent and received. Limits and measurements: docs/kernels/attend_sm90.md
// Launch    2 x items CTAs of 512 threads in clusters of 2, so that a pair has one item at most;
//           smem = sizeof(PairStorage), 1 CTA/SM
// Contract  as sm90_attend; rows of a converted format
// Numerics  as sm90_attend
#pragma once
#include "backends/nvidia/ops/attend_sm90.cuh"

namespace dsv4::nvidia::sm90_attend {

/// The rows that a CTA converts: one half of their panels is among its values, the other among its
/// keys.
template <typename Traits>
struct OwnRows {
  uint32_t low, high;  // panels 0-3, 4-7

  __device__ __forceinline__ OwnRows(PairStorage<Traits>& shared, uint32_t rank, int stage) {
    const uint32_t values =
        shared_address(shared.values[stage][0]) + rank * (Traits::kRows / 8 * Traits::kGroupStride);
    const uint32_t keys = shared_address(shared.keys[stage][0]);
    low = rank == 0 ? values : keys;
    high = rank == 0 ? keys : values;
  }
  __device__ __forceinline__ uint32_t panel(int i) const {
    return (i < 4 ? low : high) + (i & 3) * Traits::kPanelStride;
  }
};

/// Fetches the query of the item that this CTA most likely begins with into L2.
template <typename Traits>
__device__ __forceinline__ void prefetch_query(const AttendSm90Args& args, int thread) {
  const int item =
      static_cast<int>(blockIdx.x) / Traits::kCtas % (args.attend.num_tokens << args.log2_tiles);
  const int token = item >> args.log2_tiles, tile = item - (token << args.log2_tiles);
  const uint16_t* q = args.attend.q + token * args.attend.q_token_stride + (thread & 7) * 64;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int head = tile * 64 + i * 16 + (thread >> 3);
    if (head < args.attend.num_heads) prefetch_l2(q + head * args.attend.q_head_stride);
  }
}

/// A query as A fragments of 32 products.
struct PairQuery {
  uint32_t fragments[128];

  __device__ __forceinline__ void load(const AttendSm90Args& args, int token, int tile,
                                       int thread) {
    const int last_head = args.attend.num_heads - tile * 64 - 1;
    const uint16_t* q =
        args.attend.q + token * args.attend.q_token_stride + tile * 64 * args.attend.q_head_stride;
    const int head = thread / 32 * 16 + thread % 32 / 4;
    // Heads past the last one are copies of it; nobody stores what becomes of them.
    load_fragments(q + min(head, last_head) * args.attend.q_head_stride,
                   q + min(head + 8, last_head) * args.attend.q_head_stride, thread & 3, fragments);
    order_fragments(fragments, thread & 3);
  }
};

/// s[64, 32] = Q K^T of this CTA's rows, on its way.
template <typename Traits>
__device__ __forceinline__ void start_scores(float (&s)[16], const PairQuery& query,
                                             PairStorage<Traits>& shared, uint32_t rank,
                                             int stage) {
  const OwnRows<Traits> rows(shared, rank, stage);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    const uint64_t keys = swizzled_operand(rows.panel(k >> 2), 16, Traits::kGroupStride) +
                          operand_offset((k & 3) * 32);
    const uint32_t* a = query.fragments + 4 * k;
    wgmma_64x32_registers(s, a[0], a[1], a[2], a[3], keys, k != 0);
  }
  wgmma_commit();
}

template <typename Traits>
__device__ __forceinline__ void pair_score_role(const AttendSm90Args& args,
                                                PairStorage<Traits>& shared, uint32_t rank,
                                                int thread) {
  const int lane = thread & 31, warp = thread >> 5, quad = lane & 3;
  const int row = warp * 16 + (lane >> 2);  // this thread's heads: row, row + 8
  mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
  const BlockHeader first = read_header(shared.walk.headers[0]);
  if (first.token < 0) return;
  PairQuery query;
  query.load(args, first.token, first.tile, thread);
  const uint32_t to_scores = cluster_address(&shared.scores[0][warp][0][lane], rank ^ 1);
  const uint32_t to_barrier = cluster_address(&shared.scores_full[0][warp], rank ^ 1);

  float s[16];
  mbarrier_poll(shared_address(&shared.barriers.rows_full[0]), 0);
  start_scores(s, query, shared, rank, 0);
  float max[2] = {kNoMaximum, kNoMaximum}, sum[2] = {0.f, 0.f};
  bool last = false;
  for (int block = 0; !last; ++block) {
    const int parity = block & 1;
    wgmma_wait<0>();
    mask_scores(s, load_mask<4>(shared.mask[block % Traits::kStages]), quad);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      cluster_store_async(to_scores + parity * sizeof(shared.scores[0]) + g * 512, s[4 * g],
                          s[4 * g + 1], s[4 * g + 2], s[4 * g + 3],
                          to_barrier + parity * sizeof(shared.scores_full[0]));
    }
    float own[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) own[i] = s[i];

    // S of the next block runs during the softmax of this one. After the last one it is that of
    // old rows, which nobody looks at.
    last = (shared.walk.headers[block % Traits::kHeaderSlots].flags & kLastBlock) != 0;
    const int next_stage = (block + 1) % Traits::kStages;
    if (!last) {
      mbarrier_poll(shared_address(&shared.barriers.rows_full[next_stage]),
                    phase_of<Traits::kStages>(block + 1));
    }
    start_scores(s, query, shared, rank, next_stage);

    const uint32_t scores_full = shared_address(&shared.scores_full[parity][warp]);
    if (lane == 0) mbarrier_expect_bytes(scores_full, sizeof(shared.scores[0][0]));
    mbarrier_poll(scores_full, phase_of<2>(block));
    float all[32];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const uint4 other = load_shared_16(shared_address(&shared.scores[parity][warp][g][lane]));
      const float values[4] = {__uint_as_float(other.x), __uint_as_float(other.y),
                               __uint_as_float(other.z), __uint_as_float(other.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        all[4 * g + i] = rank == 0 ? own[4 * g + i] : values[i];
        all[16 + 4 * g + i] = rank == 0 ? values[i] : own[4 * g + i];
      }
    }
    float alpha[2];
    uint32_t p[16];
    softmax(all, args.attend.scale_log2, max, sum, alpha, p);

    if (block > 0) {
      mbarrier_poll(shared_address(&shared.barriers.p_empty), phase_of<1>(block) ^ 1);
    }
    store_weights(shared.p, p, warp, lane);
    if (quad == 0) {
      shared.alpha[row] = alpha[0];
      shared.alpha[row + 8] = alpha[1];
    }
    if (last) {
      Sinks sinks;
      sinks.load(args, first.tile, row);
      finish_rows(args, first, row, quad, sinks, rank == 0, shared.factors, max, sum);
    }
    fence_proxy_async();
    mbarrier_arrive(shared_address(&shared.barriers.p_full));
  }
  wgmma_wait<0>();
}

/// Finds the rows, ahead of the loader. One warp.
template <typename Traits>
__device__ __forceinline__ void pair_walk_role(PairStorage<Traits>& shared,
                                               const BlockWalk<Traits>& walk) {
  walk.get_ahead(shared.barriers);
  for (int block = 0; shared.walk.headers[block % Traits::kHeaderSlots].token >= 0; ++block) {
    const int stage = block % Traits::kStages;
    walk.step(block);
    // The loader has used the addresses of this block.
    mbarrier_poll(shared_address(&shared.barriers.rows_full[stage]),
                  phase_of<Traits::kStages>(block));
    mbarrier_arrive(shared_address(&shared.barriers.rows_empty[stage]));
  }
}

/// Where a thread's share of 8 rows goes (PassAddresses).
template <typename Traits>
struct PairAddresses {
  uint32_t raw, scales;
  uint32_t low, high;  // values 0-7 of panels 0 and 4

  __device__ __forceinline__ uint32_t unit(int i, int upper) const {
    return ((i < 4 ? low : high) ^ (upper << 4)) + (i & 3) * Traits::kPanelStride;
  }
};

template <typename Traits>
__device__ __forceinline__ void pair_load_and_convert(const AttendSm90Args& args,
                                                      PairStorage<Traits>& shared, uint32_t rank,
                                                      int warp, int lane) {
  const int row = lane >> 2, chunk = lane & 3, odd = row & 1;
  const uint32_t row_offset = warp * Traits::kGroupStride + row * 128;
  const uint32_t rope_offset = row_offset + (((chunk + 4 * odd) ^ row) << 4);
  const uint32_t raw = shared_address(shared.raw[warp]);
  const uint32_t addresses = shared_address(shared.walk.addresses[warp]) + row * 8;
  const auto address = [&](int slot) {
    const uint2 bits = load_shared_2(addresses + slot * 8 * 8);
    return RowAddress{static_cast<uint64_t>(bits.y) << 32 | bits.x};
  };
  mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
#pragma unroll 1
  for (int i = 0; i < Traits::kRawSlots; ++i) {
    gather_raw<Traits>(address(i), args.wide_rows, raw + i * Traits::kRawSlotBytes, row, chunk);
  }
  mbarrier_poll(shared_address(&shared.barriers.blocks_known[1]), 0);

  int stage = 0, slot = 0;  // block % kStages, block % kAddressSlots
  uint32_t phase = 1;       // of the uses of a stage: the first one is free
  for (int block = 0; shared.walk.headers[block % Traits::kHeaderSlots].token >= 0; ++block) {
    if (block >= Traits::kStages) {
      mbarrier_poll(shared_address(&shared.barriers.rows_empty[stage]), phase);
    }
    const uint32_t mask = __ballot_sync(~0u, address(slot).valid());
    if (lane == 0) shared.mask[stage][warp] = mask;
    copy_async_wait<Traits::kRawSlots - 1>();
    __syncwarp();
    const uint32_t raw_slot = raw + (block % Traits::kRawSlots) * Traits::kRawSlotBytes;
    const OwnRows<Traits> rows(shared, rank, stage);
    const uint32_t offset = row_offset + ((2 * chunk ^ row) << 4);
    const PairAddresses<Traits> at = {raw_slot + row * Traits::kRawRowBytes + chunk * 16,
                                      raw_slot + 8 * Traits::kRawRowBytes + row * 8,
                                      rows.low + offset, rows.high + offset};
    convert_pass<Traits>(at, rows.panel(7) + rope_offset, odd);
    fence_proxy_async();
    mbarrier_arrive(shared_address(&shared.barriers.rows_full[stage]));
    __syncwarp();
    if (lane == 0) {  // a copy of these 8 rows, as the other CTA's values
      const uint32_t to =
          cluster_address(shared.values[stage][rank * (Traits::kRows / 8) + warp], rank ^ 1);
      cluster_copy_async(to, shared_address(shared.keys[stage][warp]), Traits::kGroupStride,
                         cluster_address(&shared.values_full[stage], rank ^ 1));
    }
    const int ahead = slot + Traits::kRawSlots;
    gather_raw<Traits>(
        address(ahead < Traits::kAddressSlots ? ahead : ahead - Traits::kAddressSlots),
        args.wide_rows, raw_slot, row, chunk);
    slot = slot == Traits::kAddressSlots - 1 ? 0 : slot + 1;
    stage = stage == Traits::kStages - 1 ? 0 : stage + 1;
    if (stage == 0) phase ^= 1;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_pair_kernel(const __grid_constant__ AttendSm90Args args) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<PairStorage<Traits>*>(storage);
  const int role = __shfl_sync(~0u, threadIdx.x >> 7, 0);
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (auto& parity : shared.scores_full) {
      for (uint64_t& barrier : parity) mbarrier_init(shared_address(&barrier), 1);
    }
    for (uint64_t& barrier : shared.values_full) mbarrier_init(shared_address(&barrier), 1);
    // rows_empty: output role, walk, and the warps of the other CTA's output role.
    init_barriers(shared.barriers, 128 + 32 + 4, 128);
    fence_mbarrier_init();
  }
  __syncwarp();
  cluster_arrive_relaxed();
  follow_kernels_before();
  WalkState walk_state;
  const BlockWalk<Traits> walk{args, shared.walk, &walk_state};
  if (role == 2 && thread_of_role() < 32) {
    walk.start();
  } else if (role == 0) {
    prefetch_query<Traits>(args, thread_of_role());
  }
  __syncthreads();
  cluster_wait();
  if (role == 0) {
    increase_registers<Traits::kScoreRegisters>();
    pair_score_role(args, shared, rank, thread_of_role());
  } else if (role == 3) {
    decrease_registers<Traits::kLoaderRegisters>();
    pair_load_and_convert(args, shared, rank, thread_of_role() >> 5, thread_of_role() & 31);
  } else if (role == 2) {
    decrease_registers<Traits::kWalkRegisters>();
    if (thread_of_role() < 32) pair_walk_role(shared, walk);
  } else {
    increase_registers<Traits::kOutputRegisters>();
    output_role<Traits>(args, shared);
  }
  // The other CTA may still write here.
  __syncwarp();
  cluster_arrive_relaxed();
  cluster_wait();
}

}  // namespace dsv4::nvidia::sm90_attend

namespace dsv4::nvidia {

template <KvFormat kFormat>
void launch_attend_sm90_pair(const AttendSm90Args& args, cudaStream_t stream) {
  using Traits = sm90_attend::PairTraits<kFormat>;
  launch<sm90_attend::attend_pair_kernel<Traits>>(
      {dim3(static_cast<unsigned>(args.num_items) * Traits::kCtas), Traits::kThreads,
       sizeof(sm90_attend::PairStorage<Traits>), Traits::kCtas},
      stream, args);
}

}  // namespace dsv4::nvidia
