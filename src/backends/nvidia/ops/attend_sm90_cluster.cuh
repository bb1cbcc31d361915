// sm90_attend_cluster: sm90_attend for calls of few items, each shared by a cluster of 2, 4 or 8
// CTAs.
//
// Problem   as sm90_attend, and the same bits: every sum has the same terms in the same order
// Tiling    item = (token, 64 heads, chain), for a cluster of N CTAs. CTA r owns blocks r, r + N,
//           ... up to their weights P, and columns 512 / N r ... of the output. Five warpgroups
//           (cluster of 2: four):
//             0     S [64 x 64] of an own block; row maxima to all CTAs and from them; P to all
//             1     O[64 x 512 / N] += P V for every block, in order
//             2     gathers and converts its columns of all blocks (cluster of 4: 2, 3)
//             3, 4  gather and convert its own blocks, all columns (cluster of 2: 2, 3; of 4: 4)
//           In clusters of 4 and 8 all rows are thus converted twice, as keys and as values:
//           cheaper than to send what was converted, and nothing waits for its reader elsewhere. In
//           clusters of 2 the copy engine sends the other CTA its half of what was converted.
//           Where clusters of 8 are left, 2 or 4 of them take an item, each for its own warps of 16
//           heads: they convert and multiply the same, but tell each other less.
//           What is serial in a chain is exchanged as it is: the reference maximum is found by
//           every CTA from the maxima of all blocks in their order (a round of N blocks at a time),
//           sums are added up where O is.
// Budget    a round of N blocks and CTA: 1024 clocks of wgmma for S, 256 x 4 / N each for O;
//           conversion of 2 x 32768 values; 9.5 KB of P of every block to all CTAs, through the L2.
//           Limits and measurements: docs/kernels/attend_sm90.md
// Launch    N x items (x 2, 4) CTAs of 640 threads (N = 2: 512) in clusters of N, so that a cluster
//           has one item; smem = sizeof(ClusterStorage), 1 CTA/SM
// Contract  as sm90_attend
// Numerics  as sm90_attend
#pragma once
#include "backends/nvidia/ops/attend_sm90.cuh"
#include "backends/nvidia/ops/attend_sm90_cluster_pair.cuh"
#include "backends/nvidia/ops/attend_sm90_cluster_weights.cuh"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia::sm90_attend {

/// The query of this cluster's item, on its way to where keys will lie: each warp copies the heads
/// that it takes.
template <typename Traits>
__device__ __forceinline__ void copy_query(const AttendSm90Args& args,
                                           ClusterStorage<Traits>& shared, int warp, int lane) {
  if (!has_heads<Traits>(args, warp)) return;
  const ItemPlace item = item_of_cluster<Traits>(args);
  const int last_head = args.attend.num_heads - item.tile * 64 - 1;
  const uint16_t* q = args.attend.q + item.token * args.attend.q_token_stride +
                      item.tile * 64 * args.attend.q_head_stride + lane * 8;
  const uint32_t to = shared_address(shared.keys) + lane * 16;
#pragma unroll 4
  for (int i = 0; i < 16; ++i) {
    const int head = warp * 16 + i;
    // Heads past the last one are copies of it; nobody stores what becomes of them.
    const uint16_t* from = q + min(head, last_head) * args.attend.q_head_stride;
    copy_async_stream(to + head * Traits::kQueryPitch, from, 16);
    copy_async_stream(to + head * Traits::kQueryPitch + 512, from + 256, 16);
  }
  copy_async_commit();
}

/// As A fragments of 32 products.
template <typename Traits>
__device__ __forceinline__ void take_query(uint32_t (&fragments)[32][4],
                                           ClusterStorage<Traits>& shared, bool active, int warp,
                                           int lane) {
  if (!active) {
#pragma unroll
    for (auto& of_product : fragments) {
#pragma unroll
      for (uint32_t& x : of_product) x = 0;
    }
    mbarrier_arrive(shared_address(&shared.query_taken));
    return;
  }
  copy_async_wait<0>();
  __syncwarp();
  const uint32_t from = shared_address(shared.keys) +
                        (warp * 16 + (lane & 15)) * Traits::kQueryPitch + (lane >> 4) * 16;
#pragma unroll
  for (int k = 0; k < 32; ++k) load_matrix_x4(fragments[k], from + k * 32);
  mbarrier_arrive(shared_address(&shared.query_taken));
}

/// Blocks of this CTA: S, the exchange of maxima, P. A warp that starts products waits until nearly
/// all of them are done, so that S of the next block comes after P of this one.
template <typename Traits>
__device__ __forceinline__ void cluster_score_role(const AttendSm90Args& args,
                                                   ClusterStorage<Traits>& shared, int rank,
                                                   int thread) {
  const int lane = thread & 31, warp = thread >> 5, quad = lane & 3;
  const int num_blocks = shared.item.num_blocks;
  const uint32_t base = storage_base(shared);
  const auto at = [&](const void* member) { return member_address(base, shared, member); };
  uint32_t query[32][4];
  take_query(query, shared, has_heads<Traits>(args, warp), warp, lane);
  float max[2] = {kNoMaximum, kNoMaximum};  // after the rounds before
  int round = 0;
#pragma unroll 1
  for (int block = rank; block < num_blocks; block += Traits::kCtas, ++round) {
    const int parity = round & 1, stage = round % Traits::kKeyStages;
    const int in_round = min(num_blocks - round * Traits::kCtas, Traits::kCtas);
    float s[32];
#pragma unroll
    for (float& x : s) x = 0.f;
    const uint64_t keys = swizzled_operand(uniform(at(shared.keys[stage])), 16, 1024);
    mbarrier_poll(at(&shared.keys_full[stage]), phase_of<Traits::kKeyStages>(round));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 32; ++k) {
      const uint32_t* a = query[k];
      wgmma_64x64_registers(s, a[0], a[1], a[2], a[3],
                            keys + operand_offset((k >> 2) * Traits::kPanelBytes + (k & 3) * 32));
    }
    wgmma_commit();
    wgmma_wait<0>();
    mask_scores(s, load_mask<8>(at(shared.mask[parity])), quad);
    mbarrier_arrive(at(&shared.keys_empty[stage]));
    if (!has_heads<Traits>(args, warp)) continue;

    // The maxima of the round's blocks, to and from all CTAs that have one.
    float largest[2];
    block_maxima(s, args.attend.scale_log2, largest);
    const uint32_t full = at(&shared.maxima_full[parity][warp]);
    if (lane == 0) mbarrier_expect_bytes(full, in_round * sizeof(shared.maxima[0][0][0]));
#pragma unroll
    for (int i = 0; i < (Traits::kCtas + 3) / 4; ++i) {
      const int to = 4 * i + quad;
      if (to < in_round) {
        cluster_store_async(cluster_address(at(&shared.maxima[parity][rank][warp][lane >> 2]), to),
                            largest[0], largest[1], cluster_address(full, to));
      }
    }
    mbarrier_poll(full, phase_of<2>(round));
    float reference[2] = {};  // of the block
    const uint32_t maxima = at(&shared.maxima[parity][0][warp][lane >> 2]);
#pragma unroll
    for (int i = 0; i < Traits::kCtas; ++i) {
      const uint2 of_block = load_shared_2(maxima + i * sizeof(shared.maxima[0][0]));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = __uint_as_float(h == 0 ? of_block.x : of_block.y);
        if (i == rank) reference[h] = max[h];
        if (i < in_round) max[h] = moved_reference(x, max[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) reference[h] = moved_reference(largest[h], reference[h]);

    float sum[2];
    uint32_t p[16];
    block_weights(s, args.attend.scale_log2, reference, sum, p);
    const auto slots = WeightSlots<Traits>::of(args);
    const int place = slots.place(slots.slot(block), warp);
    if constexpr (Traits::kMulticast) {
      store_sent_weights(sent_weights(args, parity, warp), p, sum, reference, lane);
    }
    if (block >= slots.count()) {
      const int uses = round - (slots.count() - rank + Traits::kCtas - 1) / Traits::kCtas;
      mbarrier_poll(at(&shared.weights_free[warp]), phase_of<1>(uses));
    }
    if constexpr (Traits::kMulticast) {
      // All lanes have seen that phase end: what is sent now may let the next one end.
      __syncwarp();
      if (lane == 0) {
        copy_to_cluster(at(&shared.weights[place]), sent_weights(args, parity, warp),
                        sizeof(BlockWeights), at(&shared.weights_full[place]),
                        (1u << Traits::kCtas) - 1);
      }
      __syncwarp();
      continue;
    }
    const BlockWeights& weights = shared.weights[place];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_shared_4(at(&weights.p[k][lane]), p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]);
    }
    store_shared_2(at(&weights.sums[lane]), __float_as_uint(sum[0]), __float_as_uint(sum[1]));
    if (quad == 0) {
      store_shared_2(at(&weights.reference[lane >> 2]), __float_as_uint(reference[0]),
                     __float_as_uint(reference[1]));
    }
    fence_proxy_async();
    mbarrier_arrive(at(&shared.weights_full[place]));
    __syncwarp();
    send_weights(shared, base, rank, place, lane);
  }
}

/// Accumulators of this CTA's columns.
template <typename Traits>
struct Output {
  static constexpr int kProducts = Traits::kColumns / Traits::kProductColumns;
  float values[kProducts][Traits::kProductColumns / 2] = {};

  __device__ __forceinline__ const float& at(int i) const {
    return values[i / (Traits::kProductColumns / 2)][i % (Traits::kProductColumns / 2)];
  }
  __device__ __forceinline__ void scale(const float (&alpha)[2]) {
#pragma unroll
    for (auto& of_product : values) {
#pragma unroll
      for (int i = 0; i < Traits::kProductColumns / 2; ++i) of_product[i] *= alpha[i >> 1 & 1];
    }
  }
};

/// x[i] of lane j of a quad goes to x[j] of its lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int quad) {
  const bool odd = (quad & 1) != 0, upper = (quad & 2) != 0;
  const uint32_t t0 = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  const uint32_t t1 = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  (odd ? x[0] : x[1]) = t0;
  (odd ? x[2] : x[3]) = t1;
  const uint32_t t2 = __shfl_xor_sync(~0u, upper ? x[0] : x[2], 2);
  const uint32_t t3 = __shfl_xor_sync(~0u, upper ? x[1] : x[3], 2);
  (upper ? x[0] : x[2]) = t2;
  (upper ? x[1] : x[3]) = t3;
}

/// Writes 64 heads x kColumns dims from `column` on (two rows a thread) as bf16: the words of a
/// quad are transposed, so that a thread stores 16 bytes.
template <int kColumns, typename Value>
__device__ __forceinline__ void store_output_rows(const AttendSm90Args& args,
                                                  const BlockHeader& item, int column, int row,
                                                  int quad, const float (&inverse)[2],
                                                  const Value& value) {
  const int head = item.tile * 64 + row;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint16_t* out = args.attend.out + item.token * args.attend.out_token_stride +
                    (head + 8 * h) * args.attend.out_head_stride + column + quad * 8;
    asm volatile("" : "+l"(out));  // one address register, immediate offsets
    const bool stored = head + 8 * h < args.attend.num_heads;
#pragma unroll
    for (int g = 0; g < kColumns / 32; ++g) {
      uint32_t x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = (4 * g + c) * 4 + 2 * h;
        x[c] = pack_bf16x2(value(i) * inverse[h], value(i + 1) * inverse[h]);
      }
      transpose_quad(x, quad);
      if (stored) {
        *reinterpret_cast<uint4*>(out + g * 32) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

/// What is left of an item: this CTA's columns of 64 heads.
template <typename Traits>
__device__ __forceinline__ void store_columns(const AttendSm90Args& args, const BlockHeader& item,
                                              int rank, const float2 (&sums)[2], const Sinks& sinks,
                                              const Output<Traits>& o) {
  const int thread = thread_of_role(), quad = thread & 3, row = row_of_thread();
  const int column = rank * Traits::kColumns;
  if (__any_sync(~0u, (item.flags & kOnlyChain) != 0)) {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse[h] = sums[h].y != 0.f ? inverse_denominator(sums[h].x, sums[h].y, sinks.of[h]) : 0.f;
    }
    store_output_rows<Traits::kColumns>(args, item, column, row, quad, inverse,
                                        [&](int i) { return o.at(i); });
  } else {
    // As store_chain: 128 threads and 32 vectors for either half of the columns.
    float4* values = args.chains.values + (chain_slot(args, item) * 32 + column % 256 / 8) * 256 +
                     column / 256 * 128 + thread;
#pragma unroll
    for (int k = 0; k < Traits::kColumns / 8; ++k) {
      __stcg(values + k * 256,
             make_float4(o.at(4 * k), o.at(4 * k + 1), o.at(4 * k + 2), o.at(4 * k + 3)));
    }
  }
  if (rank != 0 || quad > 1) return;
  const float2 of_head = quad == 0 ? sums[0] : sums[1];
  store_sum(args, item, row + 8 * quad, of_head.x, of_head.y);
}

/// O of this CTA's columns.
template <typename Traits>
__device__ __forceinline__ void cluster_output_role(const AttendSm90Args& args,
                                                    ClusterStorage<Traits>& shared, int rank) {
  const int lane = thread_of_role() & 31, warp = thread_of_role() >> 5;
  const int num_blocks = shared.item.num_blocks;
  const uint32_t base = storage_base(shared);
  const auto at = [&](const void* member) { return member_address(base, shared, member); };
  // Asked for now, because it is at the end of everything that they are used.
  Sinks sinks;
  sinks.load(args, static_cast<int>(shared.item.tile), row_of_thread());
  Output<Traits> o;
  float sum[2] = {0.f, 0.f}, max[2] = {kNoMaximum, kNoMaximum};
  const bool active = has_heads<Traits>(args, warp);
  const auto slots = WeightSlots<Traits>::of(args);
  int owner = 0, slot = 0, stage = 0;
  uint32_t slot_phase = 0, stage_phase = 0;
  for (int block = 0; block < num_blocks; ++block) {
    uint32_t p[16] = {};
    if (active) {
      const int place = slots.place(slot, warp);
      const uint32_t full = at(&shared.weights_full[place]);
      if (Traits::kMulticast || owner != rank) {
        if (lane == 0) {
          mbarrier_expect_bytes(full, sizeof(BlockWeights));
        } else {
          mbarrier_arrive(full);
        }
      }
      mbarrier_poll(full, slot_phase);
      const BlockWeights& weights = shared.weights[place];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint4 x = load_shared_16(at(&weights.p[k][lane]));
        p[4 * k] = x.x;
        p[4 * k + 1] = x.y;
        p[4 * k + 2] = x.z;
        p[4 * k + 3] = x.w;
      }
      const uint2 reference = load_shared_2(at(&weights.reference[lane >> 2]));
      const uint2 block_sum = load_shared_2(at(&weights.sums[lane]));
      float alpha[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float moved = __uint_as_float(h == 0 ? reference.x : reference.y);
        alpha[h] = factor_of_move(max[h], moved);
        max[h] = moved;
      }
      sum[0] = add_block_sum(sum[0], alpha[0], __uint_as_float(block_sum.x));
      sum[1] = add_block_sum(sum[1], alpha[1], __uint_as_float(block_sum.y));
      if (block > 0 && __any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {
        o.scale(alpha);
      }
    }

    uint32_t values_at = at(shared.values[stage]);
    const int round = block / Traits::kCtas;
    if constexpr (Traits::kSendsValues) {
      // Own blocks lie where their keys do, and are there since P is.
      if (owner == rank) {
        values_at = at(shared.keys[round & 1][rank * Traits::kValuePanels]);
      } else {
        const uint32_t full = at(&shared.values_full[0]);
        if (thread_of_role() == 0) mbarrier_expect_bytes(full, sizeof(shared.values[0]));
        mbarrier_poll(full, phase_of<1>(round));
      }
    } else {
      mbarrier_poll(at(&shared.values_full[stage]), stage_phase);
    }
    const uint64_t values = swizzled_operand(values_at, Traits::kPanelStride, Traits::kGroupStride);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < o.kProducts; ++i) {
        ValueProduct<Traits::kProductColumns>::run(
            o.values[i], p + 4 * k,
            values + operand_offset(k * 2 * Traits::kGroupStride + i * 2 * Traits::kPanelStride));
      }
    }
    wgmma_commit();
    // The warp has read the slot.
    const int next = block + slots.count();
    if (active && next < num_blocks) {
      fence_proxy_async();
      __syncwarp();
      const int writer = next % Traits::kCtas;
      if (writer == rank) {
        mbarrier_arrive(at(&shared.weights_free[warp]));
      } else if (lane == 0) {
        cluster_mbarrier_arrive(cluster_address(at(&shared.weights_free[warp]), writer));
      }
    }
    wgmma_wait<0>();
    if constexpr (Traits::kSendsValues) {
      if (owner == rank) {
        mbarrier_arrive(at(&shared.keys_empty[round & 1]));
      } else if (lane == 0) {
        cluster_mbarrier_arrive(cluster_address(&shared.keys_empty[round & 1], owner));
        cluster_mbarrier_arrive(cluster_address(&shared.values_empty[0], owner));
      }
    } else {
      mbarrier_arrive(at(&shared.values_empty[stage]));
    }
    owner = owner == Traits::kCtas - 1 ? 0 : owner + 1;
    slot = slot == slots.count() - 1 ? 0 : slot + 1;
    if (slot == 0) slot_phase ^= 1;
    stage = stage == Traits::kValueSlots - 1 ? 0 : stage + 1;
    if (stage == 0) stage_phase ^= 1;
  }
  if (!active) return;
  float2 sums[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    sums[h] = make_float2(max[h], sum[h]);
  }
  BlockHeader item{};
  item.token = shared.item.token;
  item.tile = shared.item.tile;
  item.chain = shared.item.chain;
  item.flags = shared.item.flags;
  store_columns<Traits>(args, item, rank, sums, sinks, o);
}

template <typename Traits>
__device__ __forceinline__ void init_cluster_barriers(ClusterStorage<Traits>& shared) {
  mbarrier_init(shared_address(&shared.query_taken), 128);
  for (auto& of_warp : shared.raw_full) {
    for (uint64_t& barrier : of_warp) mbarrier_init(shared_address(&barrier), 1);
  }
  constexpr bool kSends = Traits::kSendsValues;
  for (int i = 0; i < Traits::kKeyStages; ++i) {
    mbarrier_init(shared_address(&shared.keys_full[i]), Traits::kKeyWarps * 32);
    // S; O of this CTA; a thread of each warp of O of the other one
    mbarrier_init(shared_address(&shared.keys_empty[i]), kSends ? 128 + 128 + 4 : 128);
  }
  for (uint64_t& barrier : shared.values_full) {
    mbarrier_init(shared_address(&barrier), kSends ? 1 : 128);
  }
  for (uint64_t& barrier : shared.values_empty) {
    mbarrier_init(shared_address(&barrier), kSends ? 4 : 128);
  }
  for (auto& parity : shared.maxima_full) {
    for (uint64_t& barrier : parity) mbarrier_init(shared_address(&barrier), 1);
  }
  for (uint64_t& barrier : shared.weights_full) mbarrier_init(shared_address(&barrier), 32);
  for (uint64_t& barrier : shared.weights_free) {
    mbarrier_init(shared_address(&barrier), 32 + Traits::kCtas - 1);  // the CTA's own warp: all
  }
  fence_mbarrier_init();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_cluster_kernel(const __grid_constant__ AttendSm90Args args) {
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<ClusterStorage<Traits>*>(storage);
  const int role = uniform(threadIdx.x >> 7);
  // Read anew wherever it is used, as the number of the thread is.
  const auto rank = [] { return static_cast<int>(cluster_rank()); };
  if (threadIdx.x == 384) init_cluster_barriers(shared);
  __syncwarp();
  cluster_arrive_relaxed();
  if (role == 2) {
    const int token = item_of_cluster<Traits>(args).token;
    prefetch_lists(args, token, thread_of_role());
    prefetch_window<Traits, Traits::kCtas>(args, token, rank(), thread_of_role());
  }
  if (role == 3) prefetch_query<Traits>(args, rank(), thread_of_role());
  // Ranges are known sooner than rows and queries: then each role waits when it has found its own.
  if (!args.starts_early) sm90::wait_for_kernels_before();
  if (threadIdx.x == 128) start_item(args, shared);
  if (role == 0) {
    if (args.starts_early) {
      __syncthreads();
      sm90::wait_for_kernels_before();
    }
    if constexpr (Traits::kSendsValues) sm90::start_next_kernel();
    copy_query(args, shared, thread_of_role() >> 5, thread_of_role() & 31);
  }
  if (role != 0 || !args.starts_early) __syncthreads();
  cluster_wait();
  if (shared.item.num_blocks > 0) {
    if (role == 0) {
      increase_registers<Traits::kScoreRegisters>();
      cluster_score_role(args, shared, rank(), thread_of_role());
    } else if (role == 1) {
      if constexpr (Traits::kOutputRegisters > Traits::kLaunchRegisters) {
        increase_registers<Traits::kOutputRegisters>();
      } else {
        decrease_registers<Traits::kOutputRegisters>();
      }
      if (args.starts_early) sm90::wait_for_kernels_before();
      cluster_output_role(args, shared, rank());
    } else if constexpr (Traits::kSendsValues) {
      decrease_registers<Traits::kKeyRegisters>();
      load_keys_of_pair(args, shared, rank(), (role - 2) * 4 + (thread_of_role() >> 5),
                        thread_of_role() & 31);
    } else if (role < 2 + Traits::kValueGroups) {
      decrease_registers<Traits::kValueRegisters>();
      load_values(args, shared, rank(), role - 2, thread_of_role() >> 5, thread_of_role() & 31);
    } else {
      decrease_registers<Traits::kKeyRegisters>();
      load_keys(args, shared, rank(),
                (role - 2 - Traits::kValueGroups) * 4 + (thread_of_role() >> 5),
                thread_of_role() & 31);
    }
  } else if (args.starts_early) {
    sm90::wait_for_kernels_before();  // who waits for this one waits for them
  }
  // Not sooner: what a product asks for before it waits stands in front of the rows.
  if (!Traits::kSendsValues && role >= 2) sm90::start_next_kernel();
  // Others may still read or write here. In pairs nobody waits for what the last blocks give back,
  // so that it must be ordered before the end; all else that leaves a CTA has been waited for.
  __syncwarp();
  if constexpr (Traits::kSendsValues) {
    cluster_arrive();
  } else {
    cluster_arrive_relaxed();
  }
  cluster_wait();
}

}  // namespace dsv4::nvidia::sm90_attend

namespace dsv4::nvidia {

template <KvFormat kFormat, int kCtas>
int attend_sm90_clusters() {
  using Traits = sm90_attend::ClusterTraits<kFormat, kCtas>;
  constexpr auto kKernel = sm90_attend::attend_cluster_kernel<Traits>;
  static PerDevice known;
  return known.get([](int) {
    constexpr int kBytes = sizeof(sm90_attend::ClusterStorage<Traits>);
    allow_shared_memory(kKernel, kBytes);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kCtas, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kCtas);
    config.blockDim = dim3(Traits::kThreads);
    config.dynamicSmemBytes = kBytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int count = 0;
    DSV4_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, kKernel, &config));
    return count;
  });
}

template <KvFormat kFormat, int kCtas>
void launch_attend_sm90_cluster(const AttendSm90Args& args, cudaStream_t stream) {
  using Traits = sm90_attend::ClusterTraits<kFormat, kCtas>;
  // Where clusters are left, several share the heads of an item: what they tell each other is less.
  AttendSm90Args shared = args;
  if (Traits::kSharesHeads) {
    const int clusters = attend_sm90_clusters<kFormat, kCtas>();
    while (shared.log2_shares < 2 && args.num_items << (shared.log2_shares + 1) <= clusters) {
      ++shared.log2_shares;
    }
  }
  launch<sm90_attend::attend_cluster_kernel<Traits>>(
      {dim3(static_cast<unsigned>(args.num_items << shared.log2_shares) * kCtas), Traits::kThreads,
       sizeof(sm90_attend::ClusterStorage<Traits>), kCtas},
      stream, shared);
}

}  // namespace dsv4::nvidia
