// attend: 16 or 32 heads of one token against its rows, for gfx942 and gfx950.
//
// Problem   out[t,h,:] = sum_r p_r k_r / (sum_r p_r + 2^(sink_h log2 e - m)), p_r = 2^(z_r - m),
//           z_r = (scale log2 e) (q[t,h,:] . k_r), m = max z_r; head_dim 512
// Tiling    block = (token, 16 kTiles heads), 8 waves; wave w owns head dims [64w, 64w + 64) of
//           keys and of values, which are the same bytes of a row, so that a wave fetches its own
//           slice of the rows, from global memory into registers. Per block of 64 rows:
//             1 S slice = K[64 rows, 64] Q[16 heads, 64]^T    partial scores to shared memory
//             2 (barrier) z = sum of 8 slices, softmax of 2 heads a wave, P to shared memory;
//               (barrier) 1 and 2 once per 16 heads
//             3 rows to shared memory and back, transposed; fetch of the next block's rows;
//               O^T[64 dims, heads] += V[64 rows, 64]^T P[heads, 64 rows]^T
//           Step 3 needs four rows of one dim in a lane where step 1 needs many dims of one row.
//           E4M3 bytes are transposed (a quarter of the f32 bits), bf16 rows as halves.
// Budget    docs/kernels/attend_amd.md
// Launch    grid tokens x head tiles, 512 lanes; no scratch memory
// Contract  rows at multiples of 4 bytes; skipped rows are not read; a row with a NaN code, scale
//           or value makes its token NaN; bits depend on the token's rows and heads only: not on
//           kTiles or the grid
// Numerics  bf16 products, f32 sums: z over 64 dims per wave (mfma.h), then waves ascending; p =
// 2^(z
//           - m) within 1 ulp, rounded to bf16 for PV, sums of p unrounded in a fixed tree
#pragma once
#include "backends/amd/mfma.h"
#include "backends/amd/ops/attend_rows.h"

namespace dsv4::amd {

// ---- formats: what a wave's 64 dims of a row are

/// 448 E4M3 values with a scale per 64, 64 bf16 values.
struct Fp8DsMlaRows {
  using Codes = OcpCodes;
  static constexpr bool kScaled = true, kAnyNarrow = true, kAnyWide = true;
  DSV4_DEVICE static bool is_wide(int slice) { return slice == 7; }
  DSV4_DEVICE static int offset(int slice) { return 64 * slice; }
};
struct PlainBf16Rows {
  using Codes = OcpCodes;
  static constexpr bool kScaled = false, kAnyNarrow = false, kAnyWide = true;
  DSV4_DEVICE static bool is_wide(int) { return true; }
  DSV4_DEVICE static int offset(int slice) { return 128 * slice; }
};
/// E4M3 values whose scale is 1.
struct PlainFp8Rows {
  using Codes = OcpCodes;
  static constexpr bool kScaled = false, kAnyNarrow = true, kAnyWide = false;
  DSV4_DEVICE static bool is_wide(int) { return false; }
  DSV4_DEVICE static int offset(int slice) { return 64 * slice; }
};

// ---- memory: whatever lies there, in one instruction

template <typename T, int kAlignment = alignof(T)>
DSV4_DEVICE T load(const void* from) {
  T out;
  __builtin_memcpy(&out, __builtin_assume_aligned(from, kAlignment), sizeof out);
  return out;
}
template <int kAlignment, typename T>
DSV4_DEVICE void store(void* to, const T& value) {
  __builtin_memcpy(__builtin_assume_aligned(to, kAlignment), &value, sizeof value);
}

template <typename Rows, int kTiles, bool kChains>
struct Attend {
  using Params = AttendArgs;
  using RowFormat = Rows;
  static constexpr int kThreads = 512;
  static constexpr int kHeads = 16 * kTiles;

  static constexpr int kWaves = kThreads / gpu::kWaveSize;
  static constexpr int kRowTiles = kBlockRows / 16;
  // Rows of shared memory are 16 bytes (P: 8) further apart than they are long: 8 lanes that move
  // 16 bytes each meet 32 different banks.
  static constexpr int kNarrowPitch = 64 + 16, kWidePitch = 128 + 16;
  static constexpr int kStageRows = kBlockRows / 2;
  static constexpr int kScorePitch = kBlockRows + 4;
  static constexpr int kProbPitch = kBlockRows / 2 + 2;  // words of two

  struct Shared {
    union {
      struct {
        float of[kWaves][16][kScorePitch];
      } scores;
      struct {
        alignas(16) uint8_t rows[kWaves][kStageRows * (Rows::kAnyWide ? kWidePitch : kNarrowPitch)];
      } stage;
    };
    RowRef rows[2][kBlockRows];  // of this block and the next
    uint32_t is_read[2][kBlockRows];
    int any_read[2][2];  // per 32 rows
    alignas(16) float scales[kWaves][kBlockRows];
    alignas(16) uint32_t probs[kHeads][kProbPitch];
    float alpha[kHeads];  // what the values so far are multiplied by; in the end 1 / den
    float by_total[kHeads];
  };

  // Blocks of a compute unit: two on gfx950, where registers need not hold more than this.
  static constexpr int kBlocks =
      kTiles == 1 && !kChains && 2 * sizeof(Shared) <= platform::kSharedBytes ? 2 : 1;
  static constexpr int kMinWaves = kBlocks * kWaves / 4;

  // A wave's slice of a block of rows: row 16 t + lane % 16, a quarter of the slice by lane / 16.
  template <bool kWide>
  struct SliceRows {
    gpu::Words<4> at[kRowTiles][kWide ? 2 : 1];
    uint32_t scale_byte;  // of row `lane`
  };
  // bf16, the 8 dims of a lane in each of two steps along the dims.
  struct Keys {
    Bf16x8 at[kRowTiles][2];
  };
  struct Values {
    F32x4 at[kTiles][4];  // [.][c][i]: head lane % 16, dim 16 (lane / 16) + 4 i + c of the slice
  };
  // Of head 2 wave + lane / 32 of every tile.
  struct HeadState {
    float max[kTiles], sum[kTiles];
  };

  struct Lane {
    int wave, lane, row, quarter;  // row = lane % 16, quarter = lane / 16
  };

  // ---- rows

  template <bool kWide>
  DSV4_DEVICE static void fetch(const Shared& shared, int table, const Lane& at,
                                SliceRows<kWide>& out) {
    DSV4_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      const uint8_t* values = shared.rows[table][16 * t + at.row].values;
      DSV4_UNROLL
      for (int i = 0; i < (kWide ? 2 : 1); ++i) {
        const int offset = Rows::offset(at.wave) + (kWide ? 32 : 16) * at.quarter + 16 * i;
        out.at[t][i] = load_global_16(values + offset);
      }
    }
    out.scale_byte = 0;
    if constexpr (Rows::kScaled && !kWide) {
      const uint8_t* scales = shared.rows[table][at.lane].scales;
      out.scale_byte = load_global_byte(scales + at.wave);
    }
  }

  // Scales of a lane's rows 16 t + 4 quarter + i, from the lanes that hold them.
  DSV4_DEVICE static void put_scales(Shared& shared, const Lane& at, uint32_t scale_byte) {
    shared.scales[at.wave][at.lane] = gpu::e8m0_to_float(scale_byte) * Rows::Codes::kUnit;
    wave_sync();
  }
  DSV4_DEVICE static F32x4 scales_of(const Shared& shared, const Lane& at, int row_tile) {
    if constexpr (Rows::kScaled) {
      return load<F32x4>(&shared.scales[at.wave][16 * row_tile + 4 * at.quarter]);
    } else {
      constexpr float kUnit = Rows::Codes::kUnit;
      return F32x4{kUnit, kUnit, kUnit, kUnit};
    }
  }

  // ---- scores

  /// Codes become as the chip's converter takes them, in place.
  template <bool kWide>
  DSV4_DEVICE static void make_keys(SliceRows<kWide>& rows, Keys& keys) {
    DSV4_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      if constexpr (kWide) {
        keys.at[t][0] = rows.at[t][0];
        keys.at[t][1] = rows.at[t][1];
      } else {
        uint32_t nan = 0;
        DSV4_UNROLL
        for (int w = 0; w < 4; ++w) {
          uint32_t& codes = rows.at[t][0].word[w];
          if constexpr (Rows::Codes::kHidesNan) nan |= nan_codes(codes);
          codes = Rows::Codes::of(codes);
          Bf16x8& out = keys.at[t][w / 2];
          out.word[w % 2 * 2] = Rows::Codes::template bf16_pair<false>(codes);
          out.word[w % 2 * 2 + 1] = Rows::Codes::template bf16_pair<true>(codes);
        }
        if constexpr (Rows::Codes::kHidesNan) {
          if ((nan & 0x80808080u) != 0) keys.at[t][0].word[0] = 0x7fc07fc0u;
        }
      }
    }
  }

  template <bool kWide>
  DSV4_DEVICE static void put_scores(Shared& shared, const Lane& at, const Keys& keys,
                                     const Bf16x8 (&q)[2]) {
    DSV4_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      F32x4 z{};
      z = mfma_16x16x32_bf16(keys.at[t][0], q[0], z);
      z = mfma_16x16x32_bf16(keys.at[t][1], q[1], z);
      if constexpr (!kWide) z *= scales_of(shared, at, t);
      // Column of D: the head; rows 4 quarter + i of the tile.
      store<16>(&shared.scores.of[at.wave][at.row][16 * t + 4 * at.quarter], z);
    }
  }

  // Sum of the slices and softmax of one head a group: rows 2 i and 2 i + 1 in lane i.
  DSV4_DEVICE static void softmax(const AttendArgs& args, Shared& shared, int table, int tile,
                                  bool first_of_chain, HeadState& state) {
    const int head = gpu::group_idx(), i = gpu::group_lane();
    float z0 = 0, z1 = 0;
    DSV4_UNROLL
    for (int w = 0; w < kWaves; ++w) {
      const auto pair = load<gpu::Words<2>>(&shared.scores.of[w][head][2 * i]);
      z0 = w == 0 ? gpu::float_of(pair.word[0]) : z0 + gpu::float_of(pair.word[0]);
      z1 = w == 0 ? gpu::float_of(pair.word[1]) : z1 + gpu::float_of(pair.word[1]);
    }
    const bool read0 = shared.is_read[table][2 * i] != 0;
    const bool read1 = shared.is_read[table][2 * i + 1] != 0;
    z0 = read0 ? z0 * args.scale_log2 : -kInfinity;
    z1 = read1 ? z1 * args.scale_log2 : -kInfinity;
    float max = gpu::group_max(gpu::max(z0, z1));
    if (!first_of_chain) max = gpu::max(state.max[tile], max);
    const float alpha = first_of_chain ? 0.0f : exp2_approx(state.max[tile] - max);
    const float p0 = read0 ? exp2_approx(z0 - max) : 0.0f;
    const float p1 = read1 ? exp2_approx(z1 - max) : 0.0f;
    const float sum = gpu::group_sum(p0 + p1);
    state.sum[tile] = first_of_chain ? sum : gpu::fma(state.sum[tile], alpha, sum);
    state.max[tile] = max;
    shared.probs[16 * tile + head][i] = gpu::pack_bf16(p0, p1);
    if (i == 0) shared.alpha[16 * tile + head] = alpha;
  }

  // ---- values

  // Rows 32 half .. + 31 of the wave's slice, as they lie in a row.
  template <bool kWide>
  DSV4_DEVICE static void put_stage(Shared& shared, const Lane& at, int half,
                                    const SliceRows<kWide>& rows) {
    constexpr int kParts = kWide ? 2 : 1;
    DSV4_UNROLL
    for (int t = 0; t < 2; ++t) {
      uint8_t* to = shared.stage.rows[at.wave] +
                    (16 * t + at.row) * (kWide ? kWidePitch : kNarrowPitch) +
                    16 * kParts * at.quarter;
      DSV4_UNROLL
      for (int i = 0; i < kParts; ++i) store<16>(to + 16 * i, rows.at[2 * half + t][i]);
    }
  }

  // The staged rows 16 t + 4 quarter + i, t in {0, 1}, as operand: dim 4 (lane % 16) + c of
  // `out[c]`.
  template <bool kWide>
  DSV4_DEVICE static void take_stage(const Shared& shared, const Lane& at, int half,
                                     Bf16x8 (&out)[4]) {
    const uint8_t* stage = shared.stage.rows[at.wave];
    DSV4_UNROLL
    for (int t = 0; t < 2; ++t) {
      const int row = 16 * t + 4 * at.quarter;
      if constexpr (kWide) {
        gpu::Words<2> dims[4];
        DSV4_UNROLL
        for (int i = 0; i < 4; ++i)
          dims[i] = load<gpu::Words<2>>(stage + (row + i) * kWidePitch + 8 * at.row);
        DSV4_UNROLL
        for (int c = 0; c < 4; c += 2) {
          DSV4_UNROLL
          for (int pair = 0; pair < 2; ++pair) {
            const uint32_t even = dims[2 * pair].word[c / 2], odd = dims[2 * pair + 1].word[c / 2];
            out[c].word[2 * t + pair] = join_lower(even, odd);
            out[c + 1].word[2 * t + pair] = join_upper(even, odd);
          }
        }
      } else {
        uint32_t dims[4];
        DSV4_UNROLL
        for (int i = 0; i < 4; ++i)
          dims[i] = load<uint32_t>(stage + (row + i) * kNarrowPitch + 4 * at.row);
        // Bytes (row 0, row 1) of dims 0 and 1, of dims 2 and 3; then the same of rows 2 and 3.
        const uint32_t a = permute_bytes(dims[1], dims[0], 0x05010400);
        const uint32_t b = permute_bytes(dims[1], dims[0], 0x07030602);
        const uint32_t c = permute_bytes(dims[3], dims[2], 0x05010400);
        const uint32_t d = permute_bytes(dims[3], dims[2], 0x07030602);
        const uint32_t codes[4] = {join_lower(a, c), join_upper(a, c), join_lower(b, d),
                                   join_upper(b, d)};
        const F32x4 scale = scales_of(shared, at, 2 * half + t);
        DSV4_UNROLL
        for (int dim = 0; dim < 4; ++dim) {
          const FloatPair low = Rows::Codes::template pair<false>(codes[dim]);
          const FloatPair high = Rows::Codes::template pair<true>(codes[dim]);
          out[dim].word[2 * t] = cut_to_bf16(low * FloatPair{scale[0], scale[1]});
          out[dim].word[2 * t + 1] = cut_to_bf16(high * FloatPair{scale[2], scale[3]});
        }
      }
    }
  }

  DSV4_DEVICE static void add_values(const Shared& shared, const Lane& at, int half,
                                     const Bf16x8 (&v)[4], Values& o) {
    DSV4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      // Column of B: the head; its rows 16 t + 4 quarter + i.
      const uint32_t* probs = &shared.probs[16 * tile + at.row][16 * half + 2 * at.quarter];
      const auto first = load<gpu::Words<2>>(probs);
      const auto second = load<gpu::Words<2>>(probs + 8);
      const Bf16x8 p{first.word[0], first.word[1], second.word[0], second.word[1]};
      DSV4_UNROLL
      for (int c = 0; c < 4; ++c) o.at[tile][c] = mfma_16x16x32_bf16(v[c], p, o.at[tile][c]);
    }
  }

  DSV4_DEVICE static void multiply(Values& o, const Lane& at, const float* by) {
    DSV4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const float factor = by[16 * tile + at.row];
      DSV4_UNROLL
      for (int c = 0; c < 4; ++c) o.at[tile][c] *= factor;
    }
  }

  // ---- chains and results

  // The finished chain joins the total of those before it. `shared.alpha` is free.
  DSV4_DEVICE static void merge(Shared& shared, const Lane& at, bool has_total, Values& o,
                                HeadState& state, Values& total, HeadState& total_state) {
    if (!has_total) {
      total = o;
      total_state = state;
      return;
    }
    const int head = gpu::group_idx();
    DSV4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const MergeWeights w = merge_chains(total_state.max[tile], total_state.sum[tile],
                                          state.max[tile], state.sum[tile]);
      total_state.max[tile] = w.max;
      total_state.sum[tile] = w.sum;
      if (gpu::group_lane() == 0) {
        shared.by_total[16 * tile + head] = w.by_total;
        shared.alpha[16 * tile + head] = w.by_chain;
      }
    }
    gpu::block_sync();
    multiply(o, at, shared.alpha);
    multiply(total, at, shared.by_total);
    DSV4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      DSV4_UNROLL
      for (int c = 0; c < 4; ++c) total.at[tile][c] += o.at[tile][c];
    }
    gpu::block_sync();
  }

  DSV4_DEVICE static void finish(const AttendArgs& args, Shared& shared, const Lane& at,
                                 int32_t token, int32_t first_head, bool has_rows, Values& o,
                                 const HeadState& state) {
    DSV4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int in_block = 16 * tile + gpu::group_idx(), head = first_head + in_block;
      if (gpu::group_lane() != 0 || head >= args.num_heads) continue;
      const float max = state.max[tile], sum = state.sum[tile];
      const int64_t index = int64_t{token} * args.num_heads + head;
      if (args.lse != nullptr) args.lse[index] = has_rows ? log_sum_exp(max, sum) : -kInfinity;
      if (args.max_logits != nullptr)
        args.max_logits[index] = has_rows ? natural_max(max) : -kInfinity;
      const float sink = args.sink == nullptr ? -kInfinity : args.sink[head];
      shared.alpha[in_block] = has_rows ? inverse_denominator(max, sum, sink) : 0.0f;
    }
    gpu::block_sync();
    DSV4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int in_block = 16 * tile + at.row, head = first_head + in_block;
      if (head >= args.num_heads) continue;
      const float factor = shared.alpha[in_block];
      uint16_t* out = args.out + token * args.out_token_stride + head * args.out_head_stride +
                      64 * at.wave + 16 * at.quarter;
      DSV4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const auto& v = o.at[tile];
        store<4>(out + 4 * i, gpu::Words<2>{gpu::pack_bf16(v[0][i] * factor, v[1][i] * factor),
                                            gpu::pack_bf16(v[2][i] * factor, v[3][i] * factor)});
      }
    }
  }

  // ---- the block

  // The first wave finds the rows of the next blocks, a lane each; after the last block all rows
  // are masked. `ahead` is what it knows so far.
  DSV4_DEVICE static void look_ahead(const AttendArgs& args, const TokenBlocks& blocks,
                                     const Lane& at, int32_t block, RowPlace& ahead) {
    if (at.wave != 0) return;
    ahead = {-1, 0};
    if (block < blocks.count) ahead = place_of(args, blocks, block, at.lane);
  }
  DSV4_DEVICE static void put_ahead(const AttendArgs& args, const TokenBlocks& blocks,
                                    Shared& shared, const Lane& at, int32_t block, RowPlace ahead) {
    if (at.wave != 0) return;
    const int table = block % 2;
    shared.rows[table][at.lane] = address_of(args, blocks, block, ahead);
    const int is_read = ahead.loaded >= 0 ? 1 : 0;
    shared.is_read[table][at.lane] = static_cast<uint32_t>(is_read);
    const int any = gpu::group_max(is_read);
    if (gpu::group_lane() == 0) shared.any_read[table][at.lane / 32] = any;
  }

  // All chains of the token. `out` has their values and sums, @return whether there were rows.
  template <bool kWide>
  DSV4_DEVICE static bool attend_rows(const AttendArgs& args, const TokenBlocks& blocks,
                                      Shared& shared, const Lane& at, const Bf16x8 (&q)[kTiles][2],
                                      RowPlace ahead, Values& out, HeadState& out_state) {
    // Slices of the kind that the first wave has not.
    constexpr bool kMayFind = kWide == !Rows::kAnyNarrow;
    SliceRows<kWide> rows;
    fetch(shared, 0, at, rows);
    Values o{};
    HeadState state{};
    bool seen = false;  // rows of this chain
    bool has_total = false;
    [[maybe_unused]] int32_t end = kChains ? chain_end(args, blocks, 0) : 0;
    for (int32_t block = 0; block < blocks.count; ++block) {
      const int table = block % 2;
      if constexpr (kMayFind) {
        put_ahead(args, blocks, shared, at, block + 1, ahead);
        look_ahead(args, blocks, at, block + 2, ahead);
      }
      if (uniform(shared.any_read[table][0] | shared.any_read[table][1]) != 0) {
        if constexpr (Rows::kScaled && !kWide) put_scales(shared, at, rows.scale_byte);
        Keys keys;
        make_keys(rows, keys);
        DSV4_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          put_scores<kWide>(shared, at, keys, q[tile]);
          gpu::block_sync();
          softmax(args, shared, table, tile, !seen, state);
          gpu::block_sync();
        }
        if (seen) multiply(o, at, shared.alpha);
        seen = true;
        DSV4_UNROLL
        for (int half = 0; half < 2; ++half) {
          put_stage(shared, at, half, rows);
          wave_sync();
          Bf16x8 v[4];
          take_stage<kWide>(shared, at, half, v);
          wave_sync();
          if (half == 1) fetch(shared, 1 - table, at, rows);
          add_values(shared, at, half, v, o);
        }
      } else {
        gpu::block_sync();
        fetch(shared, 1 - table, at, rows);
      }
      gpu::block_sync();  // scores, P and this block's table are free
      if constexpr (kChains) {
        if (block + 1 < end || block + 1 == blocks.count) continue;
        end = chain_end(args, blocks, block + 1);
        if (!seen) continue;
        merge(shared, at, has_total, o, state, out, out_state);
        has_total = true;
        seen = false;
        o = {};
      }
    }
    if constexpr (kChains) {
      if (seen) merge(shared, at, has_total, o, state, out, out_state);
    } else {
      out = o;
      out_state = state;
    }
    return has_total || seen;
  }

  DSV4_DEVICE static void run(const AttendArgs& args) {
    DSV4_SHARED(Shared, shared);
    const int tid = gpu::thread_idx();
    Lane at;
    at.wave = uniform(tid / gpu::kWaveSize);
    at.lane = tid % gpu::kWaveSize;
    at.row = at.lane % 16;
    at.quarter = at.lane / 16;
    const auto item = static_cast<int32_t>(gpu::block_idx());
    const int32_t token = item / args.head_tiles, first_head = item % args.head_tiles * kHeads;
    const TokenBlocks blocks = token_blocks(args, token);
    RowPlace ahead{-1, 0};
    look_ahead(args, blocks, at, 0, ahead);
    put_ahead(args, blocks, shared, at, 0, ahead);
    look_ahead(args, blocks, at, 1, ahead);
    Bf16x8 q[kTiles][2];
    DSV4_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const int head = first_head + 16 * tile + at.row;
      q[tile][0] = q[tile][1] = {};
      if (head >= args.num_heads) continue;
      const uint16_t* from = args.q + token * args.q_token_stride + head * args.q_head_stride +
                             64 * at.wave + 16 * at.quarter;
      q[tile][0] = load_global_16(from);
      q[tile][1] = load_global_16(from + 8);
    }
    gpu::block_sync();

    Values o{};
    HeadState state{};
    bool has_rows;
    // Waves of both kinds meet at the same number of barriers.
    if (Rows::is_wide(at.wave)) {
      has_rows = attend_rows<true>(args, blocks, shared, at, q, ahead, o, state);
    } else {
      has_rows = attend_rows<false>(args, blocks, shared, at, q, ahead, o, state);
    }
    finish(args, shared, at, token, first_head, has_rows, o, state);
  }
};

}  // namespace dsv4::amd
