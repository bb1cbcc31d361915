// sm90_attend: one token x 64 heads against a chain of row blocks.
//
// Problem   attend.h; rows of 512 dims, blocks of 64 rows
// Tiling    item = (token, 64 heads, chain), dealt out to persistent CTAs, first chains first. Four
//           warpgroups:
//             0     S = Q K^T [64 x 64] over 512 dims, softmax, P (bf16) to shared memory; norms
//                   and rotates Q where it comes raw (attend_sm90_queries.cuh)
//             1, 2  O[64 x 256] += P V, which leaves through shared memory, as values or as codes
//                   of the rotated values (attend_sm90_codes.cuh); the walk over items and blocks
//             3     gathers rows and writes them as bf16 into a stage: 64 rows x 512, K as it lies
//                   and V through the transposing descriptor (attend_sm90_loader.cuh)
//           Two stages, handed over by halves of their columns. Half of the query is read from
//           shared memory, half lives in registers.
//           Of a chain in two parts (attend_sm90.h, kParts) the values of the first one wait in
//           the L2 for those of the second. Where items fill the CTAs badly, they are cut (kDealt,
//           attend_sm90_deal.cuh).
// Budget    a block and 64 heads: 2 x 1024 clocks of wgmma; shared memory 320 KB = 2560 clocks;
//           584 B x 64 rows = 37 KB. Limits and measurements: docs/kernels/attend_sm90.md
// Launch    min(items, SMs) CTAs of 512 threads, smem = sizeof(SharedStorage), 1 CTA/SM
// Contract  q, out, rows 16-byte aligned (fp8_ds_mla: 8); rows that are masked (-1, outside the
//           range) are never read and contribute exactly nothing: their tile rows are zeros, their
//           P is 0; a token without rows gets 0 and lse -inf; bits depend on the token's own rows
//           only
// Numerics  q.k and p.v accumulate in f32, p rounded to bf16, sums of unrounded p. The reference
//           maximum follows the true one only when that has grown by more than 2^8: O is then
//           rarely rescaled, and p <= 2^8 is as exact in bf16 as p <= 1
#pragma once
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_codes.cuh"
#include "backends/nvidia/ops/attend_sm90_loader.cuh"
#include "backends/nvidia/ops/attend_sm90_queries.cuh"
#include "backends/nvidia/ops/attend_sm90_softmax.cuh"
#include "backends/nvidia/ops/launch.h"

namespace dsv4::nvidia::sm90_attend {

/// The query of an item: half of it is read by products from shared memory, the other half lives in
/// registers as A fragments of 16 products. Both come by the copy engine, the second half through
/// shared memory of its own, so that it is there when the item before ends: 32 KB more under way in
/// the load/store pipe, be it to registers or to shared memory, are more than the L1 has room for,
/// and everybody's loads and stores wait.
template <typename Traits>
struct Query {
  uint32_t fragments[64];  // dims 256-511

  /// Asks for dims 256 `half`... of an item; heads that do not exist become zeros. By one thread,
  /// when nobody reads what is there. Where there are compressed rows, queries leave the L2 first:
  /// rows are read by many tokens.
  __device__ __forceinline__ static void copy(const AttendSm90Args& args,
                                              SharedStorage<Traits>& shared,
                                              const BlockHeader& header, int half) {
    const uint32_t barrier = shared_address(&shared.barriers.query_full[half]);
    const uint32_t to = shared_address(half == 0 ? shared.query : shared.next_query);
    mbarrier_arrive_expecting(barrier, sizeof(shared.query));
#pragma unroll 1
    for (int i = 0; i < Traits::kQueryPanels; ++i) {
      const uint32_t panel = to + i * Traits::kPanelBytes;
      const int column = (half * Traits::kQueryPanels + i) * 128;
      const int head = static_cast<int>(header.tile) * 64;
      if (args.attend.compressed.kind != RowSource::kNone) {
        copy_box<true>(panel, args.q_map, column, head, header.token, barrier);
      } else {
        copy_box(panel, args.q_map, column, head, header.token, barrier);
      }
    }
  }
  /// Fragments of an item of `token` for which `copy` has been called; `phase` is its number
  /// modulo 2.
  __device__ __forceinline__ void take(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                       uint32_t phase, int token) {
    gpu::CosSin angle{};
    if constexpr (Traits::kRawQueries) angle = find_angle(args.rotation, token);
    mbarrier_poll(shared_address(&shared.barriers.query_full[1]), phase);
    const int lane = thread_of_role() & 31;
    const uint32_t row = shared_address(shared.next_query) +
                         ((thread_of_role() >> 5 << 4) + ((lane >> 3) & 1) * 8 + (lane & 7)) * 128;
    // Dims 16 j of a panel.
    const auto at = [&](int panel, int j) {
      return row + panel * Traits::kPanelBytes + (((j * 2 + (lane >> 4)) ^ (lane & 7)) << 4);
    };
    if constexpr (Traits::kRawQueries) {
      mbarrier_poll(shared_address(&shared.barriers.query_full[0]), phase);
      const uint32_t to_first = shared_address(shared.query) - shared_address(shared.next_query);
      norm_and_rotate(args.query_eps, angle, [&](int i, int j) {
        constexpr int kHalf = Traits::kQueryPanels;
        return i < kHalf ? at(i, j) + to_first : at(i - kHalf, j);
      });
    }
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      uint32_t a[4];
      load_matrix_x4(a, at(k >> 2, k & 3));
#pragma unroll
      for (int i = 0; i < 4; ++i) fragments[4 * k + i] = a[i];
    }
    fence_proxy_async();  // loads that are still under way must not meet the copy engine's next box
    mbarrier_arrive(shared_address(&shared.barriers.query_taken));
    barrier_sync(kScoreBarrier, 128);
  }
};

/// S over the dims of one half of the query, on its way. What the loader wrote is made visible to
/// products here, for the output roles too, not by the loader, for which others wait.
template <typename Traits>
__device__ __forceinline__ void start_scores(float (&s)[32], const Query<Traits>& query,
                                             uint64_t query_operand, uint64_t rows, int half) {
  fence_proxy_async();
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    const uint64_t at = operand_offset((k >> 2) * Traits::kPanelBytes + (k & 3) * 32);
    if (half == 0) {
      wgmma_64x64_shared(s, query_operand + at, rows + at, k != 0);
    } else {
      const uint32_t* a = query.fragments + k * 4;
      wgmma_64x64_registers(s, a[0], a[1], a[2], a[3],
                            rows + at + operand_offset(Traits::kQueryPanels * Traits::kPanelBytes));
    }
  }
  wgmma_commit();
}

template <typename Traits, bool kParts, bool kDealt>
__device__ __forceinline__ void score_role(const AttendSm90Args& args,
                                           SharedStorage<Traits>& shared, int thread) {
  const int lane = thread & 31, warp = thread >> 5, quad = lane & 3;
  const int row = warp * 16 + (lane >> 2);  // this thread's heads: row, row + 8
  if (thread == 0) prefetch_map(args.q_map);
  mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
  if (args.starts_early) follow_kernels_before();
  if (shared.walk.headers[0].token < 0) return;
  Query<Traits> query;
  if (thread_of_role() == 0) {
    for (int half : {1, 0}) query.copy(args, shared, read_header(shared.walk.headers[0]), half);
  }
  const auto angles_of = [&](int block) {
    if constexpr (Traits::kCodes) {
      if (warp != 0) return;
      const BlockHeader item = read_header(shared.walk.headers[block % Traits::kHeaderSlots]);
      const gpu::CosSin angle = find_angle(args.rotation, item.token);
      shared.angles[item.flags / kOddItem & 1][lane] = {angle.cos, -angle.sin};
    }
  };
  angles_of(0);  // before the query is there
  query.take(args, shared, 0, shared.walk.headers[0].token);
  const uint64_t query_operand = swizzled_operand(shared_address(shared.query), 16, 1024);

  uint32_t phase = 0;  // number of the item modulo 2
  for (int block = 0; shared.walk.headers[block % Traits::kHeaderSlots].token >= 0; phase ^= 1) {
    const bool first_item = block == 0;
    if (!first_item) angles_of(block);
    mbarrier_poll(shared_address(&shared.barriers.query_full[0]), phase);
    float max[2] = {kNoMaximum, kNoMaximum}, sum[2] = {0.f, 0.f};
    if constexpr (kDealt) {
      const uint32_t flags = shared.walk.headers[block % Traits::kHeaderSlots].flags;
      if (__any_sync(~0u, (flags & kTakenOver) != 0)) take_over_sums(args, max, sum);
    }
    for (bool last = false; !last; ++block) {
      const int stage = block & 1;
      const uint64_t rows = swizzled_operand(shared_address(shared.rows[stage]), 16, 1024);
      float s[32];
      const uint32_t flags = shared.walk.headers[block % Traits::kHeaderSlots].flags;
      last = (flags & kLastBlock) != 0;
      if (last && thread_of_role() == 0) {
        const BlockHeader next =
            read_header(shared.walk.headers[(block + 1) % Traits::kHeaderSlots]);
        if (next.token >= 0) {
          // The output of the item before lay there.
          if (!first_item) mbarrier_poll(shared_address(&shared.barriers.output_read), phase ^ 1);
          query.copy(args, shared, next, 1);
        }
      }
      mbarrier_poll(shared_address(&shared.barriers.rows_full[stage][0]), phase_of<2>(block));
      start_scores(s, query, query_operand, rows, 0);
      mbarrier_poll(shared_address(&shared.barriers.rows_full[stage][1]), phase_of<2>(block));
      start_scores(s, query, query_operand, rows, 1);
      const bool all_rows = load_mask<8>(shared.mask[stage]).all();
      BlockHeader next = {-1, 0, 0, 0};
      Sinks sinks;
      if (last) {
        const BlockHeader item = read_header(shared.walk.headers[block % Traits::kHeaderSlots]);
        // All warps are done with the query in shared memory: the next one can come.
        next = read_header(shared.walk.headers[(block + 1) % Traits::kHeaderSlots]);
        wgmma_wait<1>();
        barrier_sync(kScoreBarrier, 128);
        if (next.token >= 0 && thread_of_role() == 0) query.copy(args, shared, next, 0);
        sinks.load(args, item.tile, row);
      }
      wgmma_wait<0>();
      if (!all_rows) mask_scores(s, load_mask<8>(shared.mask[stage]), quad);
      float alpha[2], block_sum[2];
      uint32_t p[16];
      follow_maxima(s, args.attend.scale_log2, max, alpha);
      // Here, and not behind the weights, which the compiler then packs and stores among their
      // exponentials. Nobody waits in the first block: no phase of that parity is under way.
      mbarrier_poll(shared_address(&shared.barriers.p_empty), phase_of<1>(block) ^ 1);
      block_weights(s, args.attend.scale_log2, max, block_sum, p);
      store_weights(shared.p, p, warp, lane);
      add_block_sums(alpha, block_sum, sum);
      if (quad == 0) {
        shared.alpha[row] = alpha[0];
        shared.alpha[row + 8] = alpha[1];
      }
      // Of an item of one part P goes first: factors are long code, needed when products end.
      const bool ends = last || (kParts && (flags & kEndOfPart) != 0);
      const auto finish = [&] {
        if (kDealt && __any_sync(~0u, (flags & kHandedOver) != 0)) {
          hand_over_sums(args, max, sum);
        } else {
          finish_rows<Traits, kParts>(shared, flags, row, quad, sinks, max, sum);
        }
        max[0] = max[1] = kNoMaximum;
        sum[0] = sum[1] = 0.f;
      };
      if (kParts && ends) finish();
      fence_proxy_async();
      mbarrier_arrive(shared_address(&shared.barriers.p_full));
      if (!kParts && ends) {
        finish();
        mbarrier_arrive(shared_address(&shared.barriers.factors_known));
      }
      if (next.token >= 0) {
        query.take(args, shared, phase ^ 1, next.token);
      } else if (last) {
        // As where a query follows: the first output role does not wait for the phase before any
        // more, which it could not tell from the one after this.
        if (!first_item) mbarrier_poll(shared_address(&shared.barriers.output_read), phase ^ 1);
        mbarrier_arrive(shared_address(&shared.barriers.query_taken));
      }
    }
  }
}

/// Writes 64 heads x 256 dims from `column` on as bf16, by the copy engine from 32 KB of shared
/// memory, which is free again when thread 0 has called store_wait_read; heads that do not exist
/// are not written. Where codes leave, values only go to `staging`.
template <bool kCodes, typename Value>
__device__ __forceinline__ void store_output(const AttendSm90Args& args, const BlockHeader& item,
                                             int column, uint32_t staging, int barrier,
                                             const float (&inverse)[2], const Value& value) {
  const int lane = thread_of_role() & 31, warp = thread_of_role() >> 5;
  // Panels of 64 columns, rows of 128 bytes, swizzled.
  const uint32_t to = staging + (warp * 16 + ((lane >> 3) & 1) * 8 + (lane & 7)) * 128;
  // Two steps of two panels, so that the first leaves while the second is written.
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int g = 16 * step; g < 16 * step + 16; g += 2) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float by = inverse[i & 1];
        const int at = 4 * (g + (i >> 1)) + 2 * (i & 1);
        x[i] = pack_bf16x2(value(at) * by, value(at + 1) * by);
      }
      store_matrix_4(to + (g >> 3) * (64 * 128) + ((((g & 7) + (lane >> 4)) ^ (lane & 7)) << 4),
                     x[0], x[1], x[2], x[3]);
    }
    if (kCodes) continue;  // store_codes goes on
    fence_proxy_async();
    barrier_sync(barrier, 128);
    if (thread_of_role() == 0) {
#pragma unroll 1
      for (int i = 2 * step; i < 2 * step + 2; ++i) {
        store_box(args.out_map, column * 2 + i * 128, static_cast<int>(item.tile) * 64, item.token,
                  staging + i * (64 * 128));
      }
      store_commit();
    }
  }
}

/// Partial result of a chain: half of the dims of 64 heads.
template <typename Value>
__device__ __forceinline__ void store_chain(const AttendSm90Args& args, const BlockHeader& item,
                                            int half, const Value& o) {
  float4* values =
      args.chains.values + chain_slot(args, item) * (32 * 256) + half * 128 + thread_of_role();
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    __stcg(values + k * 256, make_float4(o(4 * k), o(4 * k + 1), o(4 * k + 2), o(4 * k + 3)));
  }
}

/// Values of the first part, of this thread, leave for the L2.
template <typename Value>
__device__ __forceinline__ void put_away(FirstPart& first, int half, const Value& o) {
  float4* values = &first.values[half][0][thread_of_role()];
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    // + 0: no -0, which a merge of this with nothing would not leave either.
    __stcg(values + k * 128,
           make_float4(o(4 * k) + 0.f, o(4 * k + 1) + 0.f, o(4 * k + 2) + 0.f, o(4 * k + 3) + 0.f));
  }
  fence_proxy_async_global();  // the copy engine brings them back
}
/// Values of both parts. Those of the first one come through `staging`, 32 KB that this role alone
/// reads, in two halves: of loads to registers few would be under way.
template <typename Value>
__device__ __forceinline__ void add_first_part(const FirstPart& first, int half,
                                               const PartWeights (&by)[2], uint32_t staging,
                                               int role_barrier, uint32_t full, Value& o) {
  constexpr uint32_t kBytes = sizeof(first.values[0]) / 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    fence_proxy_async();
    barrier_sync(role_barrier, 128);  // what lay there has been read
    if (thread_of_role() == 0) {
      mbarrier_arrive_expecting(full, kBytes);
      copy_bytes(staging, &first.values[half][16 * i], kBytes, full);
    }
    mbarrier_poll(full, i);
#pragma unroll
    for (int k = 16 * i; k < 16 * i + 16; ++k) {
      const uint4 bits = load_shared_16(staging + ((k % 16) * 128 + thread_of_role()) * 16);
      const float before[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y),
                               __uint_as_float(bits.z), __uint_as_float(bits.w)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const PartWeights& weights = by[j >> 1];
        o(4 * k + j) =
            merge_values(before[j], o(4 * k + j), weights.by_first(), weights.by_second());
      }
    }
  }
}

/// O[64 x 256] of every item.
template <typename Traits, bool kParts, bool kDealt>
__device__ __forceinline__ void output_role(const AttendSm90Args& args,
                                            SharedStorage<Traits>& shared) {
  // Read anew wherever it is used: registers are short.
  const auto half = [] { return role_of_thread() - 1; };
  const BlockWalk<Traits, kDealt> walk{args, shared.walk};
  // Votes, so that the compiler sees whole warps: else it doubles every shuffle of the epilogue.
  const auto exists = [&](int block) {
    return __any_sync(~0u, shared.walk.headers[block % Traits::kHeaderSlots].token >= 0);
  };
  const auto values_of = [&](int stage) { return shared_address(shared.rows[stage][half() * 4]); };
  const auto release = [&](int stage) {
    mbarrier_arrive(shared_address(&shared.barriers.rows_empty[stage][half()]));
  };
  const auto give_back = [&](int stage) {
    if (half() == 1) {
      release(stage);
    } else if (thread_of_role() == 0) {
      mbarrier_arrive(shared_address(&shared.barriers.output_read));
    }
  };
  // What an output left through is free again, if it is one that ended with that block.
  const auto end_store = [&](int block) {
    const uint32_t flags = shared.walk.headers[block % Traits::kHeaderSlots].flags;
    if (!__any_sync(~0u, (flags & kLastBlock) != 0 && (flags & kOnlyChain) != 0)) return;
    if (thread_of_role() == 0) store_wait_read();
    give_back(block & 1);
  };
  // Where products begin anew.
  constexpr uint32_t kEnd = kParts ? kLastBlock | kEndOfPart : kLastBlock;
  for (int block = 0; block == 0 || exists(block);) {
    float o0[64], o1[64];  // dims 0-127 and 128-255 of the half
    const auto o = [&](int i) -> float& { return i < 64 ? o0[i & 63] : o1[i & 63]; };
    // Zeroed here: accumulators that only products write stay alive for ptxas during the epilogue.
#pragma unroll
    for (int i = 0; i < 64; ++i) o0[i] = o1[i] = 0.f;
    float inverse[2];
    PartWeights weights[2];
    for (bool last = false; !last; ++block) {
      const int stage = block & 1;
      if (block == 0) {
        if (half() == 1) walk.get_ahead(shared.barriers);
        if (args.starts_early) sm90::wait_for_kernels_before();
        mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
        if (!exists(0)) return;
      }
      if (half() == 1) walk.find_places(block);
      if (block > 0) end_store(block - 1);  // late: who waits for it does not walk
      // Before the wait, what can be known then: products begin as soon as P is there.
      const uint32_t flags = shared.walk.headers[block % Traits::kHeaderSlots].flags;
      last = __any_sync(~0u, (flags & kEnd) != 0);
      const uint64_t values_operand = uniform_operand(
          swizzled_operand(values_of(stage), Traits::kPanelStride, Traits::kGroupStride));
      const uint64_t p_operand =
          uniform_operand(swizzled_operand(shared_address(shared.p), 16, 1024));
      mbarrier_poll(shared_address(&shared.barriers.p_full), phase_of<1>(block));
      if (kParts && last && thread_of_role() == 0 && (flags & kLaterPart) != 0) {
        prefetch_bytes(&args.first_parts[blockIdx.x].values[half()], sizeof(FirstPart) / 2);
      }
      if constexpr (kDealt) {
        if (__any_sync(~0u, (flags & kTakenOver) != 0)) take_over_values(args, half(), o);
      }
      const float a0 = shared.alpha[row_of_thread()], a1 = shared.alpha[row_of_thread() + 8];
      if ((flags & kFirstBlock) == 0 && __any_sync(~0u, a0 != 1.f || a1 != 1.f)) {
#pragma unroll
        for (int i = 0; i < 128; i += 4) {
          o(i) *= a0;
          o(i + 1) *= a0;
          o(i + 2) *= a1;
          o(i + 3) *= a1;
        }
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t p_at = p_operand + operand_offset(k * 32);
        const uint64_t values_at = values_operand + operand_offset(k * 2 * Traits::kGroupStride);
        wgmma_64x128_shared(o0, p_at, values_at);
        wgmma_64x128_shared(o1, p_at, values_at + operand_offset(2 * Traits::kPanelStride));
      }
      wgmma_commit();
      if (half() == 0) {
        if (block == 0) mbarrier_poll(shared_address(&shared.barriers.places_known), 0);
        walk.find_addresses(block);
      }
      if (last) {
        if (!kParts) {
          mbarrier_poll(shared_address(&shared.barriers.factors_known), (flags / kOddItem & 1) ^ 1);
        }
        const float2 heads[2] = {shared.finished[row_of_thread()],
                                 shared.finished[row_of_thread() + 8]};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          inverse[h] = heads[h].x;
          weights[h].bits = heads[h].y;
        }
      }
      wgmma_wait<0>();
      if (!last || half() == 0) release(block & 1);  // first: the loader waits for it
      if (half() == 1) copy_async_wait<0>();         // of find_places
      mbarrier_arrive(shared_address(&shared.barriers.p_empty));
    }
    const int stage = (block - 1) & 1;
    const BlockHeader item = read_header(shared.walk.headers[(block - 1) % Traits::kHeaderSlots]);
    const int barrier = kOutputBarrier + half();
    if constexpr (kParts) {
      if (__any_sync(~0u, (item.flags & kEndOfPart) != 0)) {
        if (half() == 1) release(stage);
        put_away(args.first_parts[blockIdx.x], half(), o);
        continue;
      }
    }
    // The first half leaves through the memory that the next query came by, so that the loader has
    // half of a stage to go on with.
    if (half() == 0) {
      mbarrier_poll(shared_address(&shared.barriers.query_taken), item.flags / kOddItem & 1);
    }
    const auto staging = [&] {
      return half() == 0 ? shared_address(shared.next_query) : values_of(stage);
    };
    if constexpr (kParts) {
      if (__any_sync(~0u, (item.flags & kLaterPart) != 0)) {
        add_first_part(args.first_parts[blockIdx.x], half(), weights, staging(), barrier,
                       shared_address(&shared.barriers.parts_full[half()]), o);
      }
    }
    if (kParts || half() == 1) barrier_sync(barrier, 128);  // all warps have read what lies there
    if (__any_sync(~0u, (item.flags & kOnlyChain) != 0)) {
      store_output<Traits::kCodes>(args, item, half() * 256, staging(), barrier, inverse, o);
      if constexpr (Traits::kCodes) {
        store_codes(args, item, half(), staging(), barrier,
                    shared.angles[item.flags / kOddItem & 1]);
      }
    } else {
      // Nobody still waits for query_taken, of which the S role may now end the next phase.
      if (!kParts && half() == 0) barrier_sync(barrier, 128);
      give_back(stage);
      if constexpr (kDealt) {
        hand_over_values(args, half(), o);
        continue;
      } else {
        store_chain(args, item, half(), o);
      }
    }
    // Here, while the output leaves: at the S role the next item would wait for it.
    if (half() == 0 && (thread_of_role() & 3) == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of_thread() + 8 * h;
        const float2 sums = shared.sums[item.flags / kOddItem & 1][row];
        store_sum(args, item, row, sums.x, sums.y);
      }
    }
  }
  if (thread_of_role() == 0) store_wait_read();
}

template <typename Traits, bool kParts, bool kDealt>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_kernel(const __grid_constant__ AttendSm90Args args) {
  static_assert(!(kParts && kDealt));
  extern __shared__ __align__(1024) uint8_t storage[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(storage);
  const int role = uniform(threadIdx.x >> 7);
  const BlockWalk<Traits, kDealt> walk{args, shared.walk};
  if (role == 2) walk.prefetch_first();
  if (threadIdx.x == 0) {
    init_barriers(shared.barriers);
    fence_barrier_init();
  }
  // Ranges are known sooner than rows and queries: then each role waits when it has found its own.
  if (!args.starts_early) follow_kernels_before();
  if (role == 2) walk.start();
  __syncthreads();
  if (role == 0) {
    decrease_registers<Traits::kScoreRegisters>();
    score_role<Traits, kParts, kDealt>(args, shared, thread_of_role());
  } else if (role == 3) {
    decrease_registers<Traits::kLoaderRegisters>();
    if constexpr (Traits::kConverts) {
      if (!Traits::kHasScales || args.wide_rows) {
        load_and_convert<Traits, true>(args, shared, thread_of_role() >> 5, thread_of_role() & 31);
      } else {
        load_and_convert<Traits, false>(args, shared, thread_of_role() >> 5, thread_of_role() & 31);
      }
    } else {
      load_bf16(args, shared, thread_of_role() >> 5, thread_of_role() & 31);
    }
  } else {
    increase_registers<Traits::kOutputRegisters>();
    output_role<Traits, kParts, kDealt>(args, shared);
  }
}

}  // namespace dsv4::nvidia::sm90_attend

namespace dsv4::nvidia {

template <KvFormat kFormat>
void launch_attend_sm90(const AttendSm90Args& args, int grid, cudaStream_t stream) {
  const auto run = [&]<typename Traits, bool kParts, bool kDealt>() {
    launch<sm90_attend::attend_kernel<Traits, kParts, kDealt>>(
        {dim3(static_cast<unsigned>(grid)), Traits::kThreads,
         sizeof(sm90_attend::SharedStorage<Traits>)},
        stream, args);
  };
  const auto run_items = [&]<typename Traits>() {
    if (args.first_parts != nullptr) return run.template operator()<Traits, true, false>();
    if constexpr (!Traits::kRawQueries) {
      if (args.hand_overs != nullptr) return run.template operator()<Traits, false, true>();
    }
    run.template operator()<Traits, false, false>();
  };
  const bool codes = args.codes.scale != nullptr;
  DSV4_CHECK(!args.raw_queries || kFormat == KvFormat::kFp8DsMla);
  if constexpr (kFormat == KvFormat::kFp8DsMla) {
    if (args.raw_queries) {
      if (codes) return run_items.template operator()<sm90_attend::Traits<kFormat, true, true>>();
      return run_items.template operator()<sm90_attend::Traits<kFormat, false, true>>();
    }
  }
  if (codes) return run_items.template operator()<sm90_attend::Traits<kFormat, true>>();
  run_items.template operator()<sm90_attend::Traits<kFormat>>();
}

}  // namespace dsv4::nvidia
