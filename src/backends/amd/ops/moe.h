// moe: experts of a step, grouped on the device.
//
// Problem   out[t] = shared(x[t]) + sum_i expert[ids[t, i]](x[t]), ids ascending;
//           expert(x) = w2 q(act(weight * silu(min(w1 x, limit)) * clamp(w3 x, +-limit)))
// Launches  pointers: where the experts' matrices are; sort: visits (token, expert) grouped by
//           expert, cut into tiles of tokens; prepare (linear_any.h): quantised x; products: w1 and
//           w3 of every tile; swiglu; products: w2; combine: the shared expert, then visits in
//           ascending expert
// Tiling    products are the tiles of linear.h, at most as many as there can be, the rest of the
//           grid ends at once; sort: one block, a lane an expert; swiglu: a lane group per 128
//           columns; combine: a lane per column
// Budget    docs/kernels/linear_amd.md
// Contract  bf16 activations; experts alike in type and shape, up to kMaxExperts
// Numerics  linear.h; swiglu in f32, rounded to act, then quantised; sums in f32, one rounding. A
//           token's bits do not depend on the others: their order inside an expert only moves rows
#pragma once
#include "backends/amd/ops/linear.h"
#include "backends/amd/ops/linear_any.h"
#include "backends/gpu/math.h"

namespace dsv4::amd {

constexpr int kMaxExperts = 512;

/// Where one matrix of one expert is, in bytes from the first expert of its kind: of a pointer that
/// came from memory the compiler does not know that it is global.
struct ExpertMatrix {
  int64_t data, scale;
};

struct MoePointersArgs {
  static constexpr int kCount = 128;
  ExpertMatrix* to;
  int32_t count;
  ExpertMatrix from[kCount];
};
struct MoePointers {
  using Params = MoePointersArgs;
  static constexpr int kThreads = MoePointersArgs::kCount;
  DSV4_DEVICE static void run(const Params& args) {
    const int i = gpu::thread_idx();
    if (i < args.count) args.to[i] = args.from[i];
  }
};

// ---- sort

/// Consecutive rows (sorted visits) that go to one expert.
struct TokenTile {
  int32_t expert, begin, end;
};

struct MoeSortArgs {
  const int32_t* expert_ids;  ///< [tokens, k]
  int64_t ids_stride;
  int32_t tokens, k, experts;
  int32_t tile_tokens;
  bool shared;        ///< its rows follow those of the visits
  int32_t* visit_of;  ///< [rows] token * k + i; shared: -1
  int32_t* token_of;  ///< [rows]
  int32_t* row_of;    ///< [tokens * k]
  TokenTile* tiles;
  int32_t* num_tiles;
};

struct MoeSort {
  using Params = MoeSortArgs;
  static constexpr int kThreads = 256;

  struct Storage {
    int32_t counts[kMaxExperts];
  };

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(Storage, storage);
    const int32_t visits = args.tokens * args.k;
    const auto tiles_of = [&](int32_t count) {
      return (count + args.tile_tokens - 1) / args.tile_tokens;
    };
    for (int e = gpu::thread_idx(); e < args.experts; e += kThreads) {
      int32_t count = 0;
      for_visits(args, e, [&](int32_t) { ++count; });
      storage.counts[e] = count;
    }
    gpu::block_sync();
    for (int e = gpu::thread_idx(); e < args.experts; e += kThreads) {
      int32_t row = 0, tile = 0;
      for (int before = 0; before < e; ++before) {
        row += storage.counts[before];
        tile += tiles_of(storage.counts[before]);
      }
      const int32_t end = row + storage.counts[e];
      for (int32_t begin = row; begin < end; begin += args.tile_tokens)
        args.tiles[tile++] = {e, begin,
                              begin + args.tile_tokens < end ? begin + args.tile_tokens : end};
      for_visits(args, e, [&](int32_t visit) {
        args.visit_of[row] = visit;
        args.token_of[row] = visit / args.k;
        args.row_of[visit] = row;
        ++row;
      });
    }
    int32_t tiles = 0;
    for (int e = 0; e < args.experts; ++e) tiles += tiles_of(storage.counts[e]);
    const int32_t shared_tiles = args.shared ? tiles_of(args.tokens) : 0;
    for (int32_t i = gpu::thread_idx(); i < shared_tiles; i += kThreads) {
      const int32_t begin = i * args.tile_tokens, end = begin + args.tile_tokens;
      args.tiles[tiles + i] = {args.experts, visits + begin,
                               visits + (end < args.tokens ? end : args.tokens)};
    }
    if (args.shared) {
      for (int32_t t = gpu::thread_idx(); t < args.tokens; t += kThreads) {
        args.visit_of[visits + t] = -1;
        args.token_of[visits + t] = t;
      }
    }
    if (gpu::thread_idx() == 0) *args.num_tiles = tiles + shared_tiles;
  }

 private:
  // f(visit) for the visits of an expert, ascending.
  template <typename F>
  DSV4_DEVICE static void for_visits(const Params& args, int32_t expert, F f) {
    for (int32_t t = 0; t < args.tokens; ++t) {
      for (int32_t i = 0; i < args.k; ++i) {
        if (args.expert_ids[t * args.ids_stride + i] == expert) f(t * args.k + i);
      }
    }
  }
};

// ---- products

/// w1 and w3, or w2, of all experts.
struct MoeProductsArgs {
  WeightView kinds[2];           ///< of the first routed expert and of the shared one
  const ExpertMatrix* matrices;  ///< [num_matrices][experts + 1], the shared expert is the last
  int32_t num_matrices, experts;
  const uint16_t* x;
  int64_t x_stride;
  const int32_t* x_rows;  ///< null: row of x = row of out
  float* out;             ///< [num_matrices][out_rows, rows of W]
  int64_t out_rows;
  const TokenTile* tiles;
  const int32_t* num_tiles;
};

template <typename Shape>
struct MoeProducts {
  using Params = MoeProductsArgs;
  static constexpr int kThreads = Shape::kThreads, kMinWaves = Shape::kMinWaves;
  static constexpr int kTileRows = Shape::kTileRows, kTileTokens = Shape::kTileTokens;

  /// Row tiles fastest, so that neighbours share tokens and stream one expert.
  DSV4_DEVICE static void run(const Params& args) {
    const int32_t rows = args.kinds[0].rows;
    const int32_t row_tiles = (rows + kTileRows - 1) / kTileRows;
    const auto block = static_cast<int32_t>(gpu::block_idx());
    const int32_t matrix = block / row_tiles % args.num_matrices;
    const int32_t idx = block / row_tiles / args.num_matrices;
    if (idx >= *args.num_tiles) return;  // the whole block
    const TokenTile tokens = args.tiles[idx];
    WeightView w = tokens.expert == args.experts ? args.kinds[1] : args.kinds[0];
    const ExpertMatrix where = args.matrices[matrix * (args.experts + 1) + tokens.expert];
    w.data += where.data;
    w.scale += where.scale;
    Shape::run({.w = w,
                .x = args.x,
                .x_stride = args.x_stride,
                .x_rows = args.x_rows,
                .out = args.out + matrix * args.out_rows * rows,
                .out_stride = rows,
                .out_f32 = true,
                .row0 = block % row_tiles * kTileRows,
                .token0 = tokens.begin,
                .token_end = tokens.end});
  }
};
using MoeStream16 = MoeProducts<StreamShape<1>>;
using MoeStream64 = MoeProducts<StreamShape<4>>;
using MoeTile128x64 = MoeProducts<TileShape>;

// ---- between and after

struct MoeSwigluArgs {
  const float* up;  ///< [2][rows, inter]: w1 x and w3 x
  int64_t rows;
  int32_t inter, k;
  const int32_t* visit_of;
  const float* expert_weights;
  int64_t weights_stride;
  float limit;
  bool quantise;
  gpu::Bf16* a;  ///< [rows, inter]
};

struct MoeSwiglu {
  using Params = MoeSwigluArgs;
  static constexpr int kThreads = 256;
  static constexpr int kGroups = kThreads / gpu::kGroupLanes;

  DSV4_DEVICE static void run(const Params& args) {
    const int32_t groups = (args.inter + kQuantiseCols - 1) / kQuantiseCols;
    const int64_t idx = gpu::block_idx() * kGroups + gpu::group_idx();
    const int64_t row = idx / groups;
    if (row >= args.rows) return;  // the whole group
    const int32_t visit = args.visit_of[row];
    const float weight =
        visit < 0 ? 1.0f
                  : args.expert_weights[visit / args.k * args.weights_stride + visit % args.k];
    const int32_t col =
        static_cast<int32_t>(idx % groups) * kQuantiseCols + gpu::group_lane() * kQuantiseLaneCols;
    const float* gates = args.up + row * args.inter + col;
    const float* ups = gates + args.rows * args.inter;
    float values[kQuantiseLaneCols];
    DSV4_UNROLL
    for (int i = 0; i < kQuantiseLaneCols; ++i) {
      const bool inside = col + i < args.inter;
      float gate = inside ? gates[i] : 0.0f, up = inside ? ups[i] : 0.0f;
      if (args.limit > 0) {  // comparisons that NaN passes through
        gate = gate > args.limit ? args.limit : gate;
        up = up > args.limit ? args.limit : up < -args.limit ? -args.limit : up;
      }
      const float sigmoid = 1.0f / (1.0f + gpu::exp(-gate));
      values[i] = gpu::bf16_value(gate * sigmoid * up * weight);
    }
    if (args.quantise) quantise_group(values);
    gpu::Bf16* a = args.a + row * args.inter + col;
    DSV4_UNROLL
    for (int i = 0; i < kQuantiseLaneCols; ++i) {
      if (col + i < args.inter) a[i] = gpu::to_bf16(values[i]);
    }
  }
};

struct MoeCombineArgs {
  const float* y;         ///< [rows, n]
  const int32_t* row_of;  ///< [tokens * k]
  int32_t tokens, k, n;
  bool shared;
  gpu::Bf16* out;
  int64_t out_stride;
  int32_t parts;  ///< blocks of a token
};

struct MoeCombine {
  using Params = MoeCombineArgs;
  static constexpr int kThreads = 256;

  DSV4_DEVICE static void run(const Params& args) {
    const int64_t token = gpu::block_idx() / args.parts;
    const auto part = static_cast<int32_t>(gpu::block_idx() % args.parts);
    for (int32_t col = part * kThreads + gpu::thread_idx(); col < args.n;
         col += args.parts * kThreads) {
      float sum = 0.0f;
      if (args.shared) sum = args.y[(int64_t{args.tokens} * args.k + token) * args.n + col];
      for (int32_t i = 0; i < args.k; ++i)
        sum = sum + args.y[int64_t{args.row_of[token * args.k + i]} * args.n + col];
      args.out[token * args.out_stride + col] = gpu::to_bf16(sum);
    }
  }
};

}  // namespace dsv4::amd
