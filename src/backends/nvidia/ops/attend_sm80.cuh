// attend_sm80: 16 or 32 heads of one token against its rows, for sm_80 and later.
//
// Problem   attend.h; head_dim 512, blocks of 64 rows, 16-byte aligned rows
// Tiling    CTA = (token, 16 or 32 heads[, chain]), 8 warps; warp w owns head dims [64w, 64w + 64)
//           of keys and of values, which are the same bytes of a row, so that a warp fetches and
//           converts its own slice of the rows and meets the others twice a block only:
//             1 S slice = Q[16, 64] K[64 rows, 64]^T        partial scores to shared memory
//             2 (barrier) z = sum of 8 slices, softmax of 2 heads a warp, P to shared memory
//             3 (barrier) O[16, 64] += P[16, 64 rows] V[64 rows, 64]
//           E4M3 codes are converted from the fetched bytes straight into MMA fragments, once for S
//           and once for V; no bf16 tile is written
// Budget    a block and 16 heads, fp8_ds_mla: 2.1 MFLOP = 1024 clocks of sm_80's tensor cores;
//           conversion 2 x 2.5 instructions a value = 1280 issue slots a scheduler; shared memory
//           36 KiB in, 72 KiB out, scores 32 KiB in and out = 1400 clocks
// Launch    grid min(items, what fits the device), 256 threads, persistent over items; second
//           kernel only where chains are spread over CTAs
// Contract  skipped rows are not read (zeros take their place in shared memory); a row with a NaN
//           code, scale or value makes its token NaN; bits depend on the token's rows and heads
//           only: not on the tile size, the number of stages, spreading, or the grid
// Numerics  bf16 products, f32 sums: z over 16 dims x 4 per warp, then warps ascending; p = 2^(z -
//           m) by ex2.approx, rounded to bf16 for PV, sums of p unrounded in a fixed tree
#pragma once
#include "backends/nvidia/ops/attend_sm80_block.cuh"

namespace dsv4::nvidia::attend80 {

// ---- results

// Values times their head's factor, as bf16. half 0: head lane / 4, half 1: 8 more.
template <typename T>
__device__ __forceinline__ void store_head(const AttendArgs& args, int token, int head, int warp,
                                           int lane, const float (&o)[8][4], int half,
                                           float factor) {
  if (head >= args.num_heads) return;
  const int quad = lane % 4;
  uint16_t* row = args.out + token * args.out_token_stride + head * args.out_head_stride;
  row += warp * kSlice;
  if (is_wide<T>(warp)) {  // n tile n: columns 8n + 2 quad, + 1
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      *reinterpret_cast<uint32_t*>(row + 8 * n + 2 * quad) =
          pack_bf16x2(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
    }
    return;
  }
  // n tile n: columns 16 quad + n and 16 quad + 8 + n
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint4 out;
    out.x = pack_bf16x2(o[0][2 * half + i] * factor, o[1][2 * half + i] * factor);
    out.y = pack_bf16x2(o[2][2 * half + i] * factor, o[3][2 * half + i] * factor);
    out.z = pack_bf16x2(o[4][2 * half + i] * factor, o[5][2 * half + i] * factor);
    out.w = pack_bf16x2(o[6][2 * half + i] * factor, o[7][2 * half + i] * factor);
    *reinterpret_cast<uint4*>(row + 16 * quad + 8 * i) = out;
  }
}

// Factor, log-sum-exp and largest logit of a head with rows, or 0 and -inf.
__device__ __forceinline__ float finish_head(const AttendArgs& args, int token, int head,
                                             bool has_rows, float max, float sum, bool write_lse) {
  if (head >= args.num_heads) return 0.0f;
  if (write_lse && args.lse != nullptr) {
    args.lse[int64_t{token} * args.num_heads + head] = has_rows ? log_sum_exp(max, sum) : -INFINITY;
  }
  if (write_lse && args.max_logits != nullptr) {
    args.max_logits[int64_t{token} * args.num_heads + head] =
        has_rows ? natural_max(max) : -INFINITY;
  }
  const float sink = args.sink == nullptr ? -INFINITY : __ldg(args.sink + head);
  return has_rows ? inverse_denominator(max, sum, sink) : 0.0f;
}

// Values of a slot: register by register, so that accesses are whole lines.
template <typename T, typename Use>
__device__ __forceinline__ void for_each_value(float (&o)[T::kTiles][8][4], Use use) {
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int reg = (tile * 8 + n) * 2 + j / 2;
        use(tile * 16 + 4 * j, &o[tile][n][j], reg * kThreads);
      }
    }
  }
}

/// The open chain joins the total of the chains before it, in registers; `keep` writes the total to
/// its slot, where the next chain finds it. At least one of `has_total` and `seen` holds.
template <typename T>
__device__ __forceinline__ void merge_total(SharedStorage<T>& shared, float2* slot, int warp,
                                            int lane, bool has_total, bool seen, bool keep,
                                            float (&o)[T::kTiles][8][4], HeadState<T>& state) {
  const int group = lane / 4;
  slot += threadIdx.x;
  if (seen) {
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
      if (!has_total) {
        state.total_max[tile] = state.max[tile];
        state.total_sum[tile] = state.sum[tile];
        continue;
      }
      const MergeWeights w = merge_chains(state.total_max[tile], state.total_sum[tile],
                                          state.max[tile], state.sum[tile]);
      state.total_max[tile] = w.max;
      state.total_sum[tile] = w.sum;
      if (lane % 16 == 0) {
        shared.weights[tile * 16 + 2 * warp + lane / 16] = {w.by_total, w.by_chain};
      }
    }
    __syncthreads();
  }
  for_each_value<T>(o, [&](int head, float* v, int at) {
    if (has_total) {
      const float2 total = slot[at];
      const float2 w = seen ? shared.weights[head + group] : float2{1, 0};
      v[0] = seen ? merge_values(total.x, v[0], w.x, w.y) : total.x;
      v[1] = seen ? merge_values(total.y, v[1], w.x, w.y) : total.y;
    }
    if (keep) slot[at] = {v[0], v[1]};
  });
}

template <typename T>
constexpr int kSlotValues = T::kHeads* kDim / 2;  // float2

/// What an item leaves behind: its chain for the merge kernel, or the result.
template <typename T>
__device__ __forceinline__ void finish_item(const AttendArgs& args, const Schedule& schedule,
                                            SharedStorage<T>& shared, const Item& item,
                                            int32_t index, int warp, int lane, bool spread,
                                            bool has_total, bool seen, float (&o)[T::kTiles][8][4],
                                            HeadState<T>& state) {
  const int group = lane / 4;
  if (spread) {
    float2* slot = schedule.values + int64_t{index} * kSlotValues<T> + threadIdx.x;
    for_each_value<T>(o, [&](int, float* v, int at) { slot[at] = {v[0], v[1]}; });
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
      if (lane % 16 != 0) continue;
      schedule.state[int64_t{index} * T::kHeads + tile * 16 + 2 * warp + lane / 16] = {
          state.max[tile], seen ? state.sum[tile] : -1.0f};
    }
    return;
  }
  if (has_total || seen) {
    merge_total<T>(shared, schedule.values + int64_t{blockIdx.x} * kSlotValues<T>, warp, lane,
                   has_total, seen, false, o, state);
  }
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
    const int head = tile * 16 + 2 * warp + lane / 16;
    const float factor =
        finish_head(args, item.token, item.tile * T::kHeads + head, has_total || seen,
                    state.total_max[tile], state.total_sum[tile], lane % 16 == 0);
    if (lane % 16 == 0) shared.factor[head] = factor;
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = tile * 16 + half * 8 + group;
      store_head<T>(args, item.token, item.tile * T::kHeads + head, warp, lane, o[tile], half,
                    shared.factor[head]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, T::kMinCtas)
    attend_kernel(const __grid_constant__ AttendArgs args,
                  const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(128) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<SharedStorage<T>*>(shared_bytes);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const bool wide = is_wide<T>(warp);
  const std::byte* somewhere = reinterpret_cast<const std::byte*>(args.q);  // of reads of 0 bytes

  for (int32_t index = static_cast<int32_t>(blockIdx.x); index < schedule.items;
       index += static_cast<int32_t>(gridDim.x)) {
    const Item item = open_item<T>(args, schedule, index);
    const int count = item.span.count;
    if (item.chain_begin >= item.blocks.num_chains) continue;  // spread: a chain it does not have
    const bool spread = schedule.spread_chains > 1 && item.blocks.num_chains > 1;

    const auto place_of = [&](int block, int row) {
      return place_of_chain(args, item.blocks, item.span, item.token, block, row);
    };
    const auto row_of = [&](int block, RowPlace place) {
      return row_address(source_of_chain(args, item.span, block), place);
    };
    const auto put_row = [&](int block, int row, RowRef ref) {  // whole warps
      const int table = block % T::kTables;
      shared.rows[table][row] = ref;
      const uint32_t bits = __ballot_sync(kAllLanes, ref.values != nullptr);
      if (lane == 0) shared.valid[table][row / 32] = bits;
    };

    // Rows of the first blocks, their fetch, and the query meanwhile.
    for (int i = tid; i < T::kStages * kRows; i += kThreads) {
      const int block = i / kRows, row = i % kRows;
      if (block < count) put_row(block, row, row_of(block, place_of(block, row)));
    }
    // Of row `tid`: its address in the block after those in the tables, its place in the next one.
    RowRef ahead{nullptr, nullptr};
    RowPlace further{-1, 0};
    if (tid < kRows && T::kStages < count) further = place_of(T::kStages, tid);
    __syncthreads();
#pragma unroll
    for (int block = 0; block < T::kStages; ++block) {
      if (block < count) {
        fetch_slice<T>(shared, block, block, warp, lane, somewhere);
      } else {
        copy_async_commit();
      }
    }
    QueryFragments<T> q;
    load_query<T>(args, item, warp, lane, q);
    const auto look_ahead = [&](int block) {
      if (tid >= kRows) return;
      if (block < count) ahead = row_of(block, further);
      if (block + 1 < count) further = place_of(block + 1, tid);
    };
    look_ahead(T::kStages);

    float o[T::kTiles][8][4];
    HeadState<T> state;
    bool seen = false, has_total = false;
    const auto reset = [&] {
#pragma unroll
      for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) o[tile][n][j] = 0;
        }
        state.max[tile] = -INFINITY;
        state.sum[tile] = 0;
      }
      seen = false;
    };
    reset();

    int stage = 0, table = 0;
    for (int block = 0; block < count; ++block) {
      copy_async_wait<T::kStages - 1>();
      __syncwarp();
      const bool active = (shared.valid[table][0] | shared.valid[table][1]) != 0;
      bool slow = false;
      if constexpr (T::kScaled) {
        if (!wide) {
          const int shift = 8 * (warp & 3);
          const uint32_t* scales = shared.scales[stage][warp];
          slow = __any_sync(kAllLanes, (scales[lane] >> shift & 0xff) > 134 ||
                                           (scales[lane + 32] >> shift & 0xff) > 134);
        }
      }
      float z[T::kTiles][4];
      if (active) {
#pragma unroll 1
        for (int first = 0; first < kRows; first += 32) {
          const int to = T::kExchangeRows == 32 ? 0 : first;
          if (wide) {
            score_wide<T>(shared, stage, warp, lane, first, to, q);
          } else if (slow) {
            score_codes<T, true>(shared, stage, warp, lane, first, to, q);
          } else {
            score_codes<T, false>(shared, stage, warp, lane, first, to, q);
          }
          if (T::kExchangeRows == 32 && first == 0) {
            __syncthreads();
            gather_scores<T, 0>(shared, warp, lane, 0, z);
            __syncthreads();
          }
        }
        __syncthreads();
        if (T::kExchangeRows == 64) gather_scores<T, 0>(shared, warp, lane, 0, z);
        gather_scores<T, 2>(shared, warp, lane, T::kExchangeRows - 32, z);
      }
      if (tid < kRows && block + T::kStages < count) {
        put_row(block + T::kStages, tid, ahead);
      }
      if (active) softmax<T>(args, shared, table, warp, lane, !seen, z, state);
      __syncthreads();
      look_ahead(block + T::kStages + 1);
      if (active) {
        if (seen) rescale<T>(shared, lane, o);
        seen = true;
        if (wide) {
          values_wide<T>(shared, stage, warp, lane, o);
        } else if (slow) {
          values_codes<T, true>(shared, stage, warp, lane, o);
        } else {
          values_codes<T, false>(shared, stage, warp, lane, o);
        }
      }
      __syncwarp();
      if (block + T::kStages < count) {
        fetch_slice<T>(shared, stage, (block + T::kStages) % T::kTables, warp, lane, somewhere);
      } else {
        copy_async_commit();
      }
      stage = stage + 1 == T::kStages ? 0 : stage + 1;
      table = table + 1 == T::kTables ? 0 : table + 1;

      // A chain that is not the item's last goes into the total.
      if (spread || block + 1 == count ||
          item.chain_of(args, block + 1) == item.chain_of(args, block)) {
        continue;
      }
      if (!seen) continue;
      merge_total<T>(shared, schedule.values + int64_t{blockIdx.x} * kSlotValues<T>, warp, lane,
                     has_total, true, true, o, state);
      has_total = true;
      reset();
    }
    copy_async_wait<0>();
    finish_item<T>(args, schedule, shared, item, index, warp, lane, spread, has_total, seen, o,
                   state);
    __syncthreads();  // tables and scores are free for the next item
  }
}

/// Merges the chains of a token that were spread over CTAs.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ AttendArgs args,
                 const __grid_constant__ Schedule schedule) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const auto item = static_cast<int32_t>(blockIdx.x);
  const int32_t token = item / schedule.tiles, first_head = item % schedule.tiles * T::kHeads;
  const int32_t chains = min(token_blocks(args, token).num_chains, schedule.spread_chains);
  if (chains <= 1) return;  // its CTA has written the result
  float o[T::kTiles][8][4] = {};
  float max[T::kTiles][2], sum[T::kTiles][2];
  bool has_total = false;
  for (int32_t c = 0; c < chains; ++c) {
    const int64_t index = int64_t{item} * schedule.spread_chains + c;
    const float2* state = schedule.state + index * T::kHeads + lane / 4;
    if (state[0].y < 0) continue;
    float2 w[T::kTiles][2];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 chain = state[tile * 16 + half * 8];
        if (has_total) {
          const MergeWeights weights =
              merge_chains(max[tile][half], sum[tile][half], chain.x, chain.y);
          max[tile][half] = weights.max;
          sum[tile][half] = weights.sum;
          w[tile][half] = {weights.by_total, weights.by_chain};
        } else {
          max[tile][half] = chain.x;
          sum[tile][half] = chain.y;
        }
      }
    }
    const float2* slot = schedule.values + index * kSlotValues<T> + threadIdx.x;
    for_each_value<T>(o, [&](int head, float* v, int at) {
      const float2 chain = slot[at];
      const float2 by = w[head / 16][head % 16 / 8];
      v[0] = has_total ? merge_values(v[0], chain.x, by.x, by.y) : chain.x;
      v[1] = has_total ? merge_values(v[1], chain.y, by.x, by.y) : chain.y;
    });
    has_total = true;
  }
#pragma unroll
  for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first_head + tile * 16 + half * 8 + lane / 4;
      const float factor = finish_head(args, token, head, has_total, max[tile][half],
                                       sum[tile][half], warp == 0 && lane % 4 == 0);
      store_head<T>(args, token, head, warp, lane, o[tile], half, factor);
    }
  }
}

template <typename T>
Kernel kernel_of() {
  return {attend_kernel<T>, merge_kernel<T>, static_cast<int>(sizeof(SharedStorage<T>)), T::kHeads};
}

}  // namespace dsv4::nvidia::attend80
