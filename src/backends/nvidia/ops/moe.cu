// moe: experts of a step, grouped on the device.
//
// Problem   out[t] = shared(x[t]) + sum_i expert[ids[t, i]](x[t]), ids ascending;
//           expert(x) = w2 q(act(weight * silu(min(w1 x, limit)) * clamp(w3 x, +-limit)))
// Launches  sort: visits (token, expert) grouped by expert, cut into tiles of tokens; 1 block
//           up: w1 and w3 of every tile     swiglu: one warp per 128 columns     down: w2
//           combine: per token the shared expert, then visits in ascending expert
// Tiling    up and down are linear_stream's and linear_tile's tiles, whose number only the device
//           knows: blocks stride over them. The shared expert joins the tiles of a few tokens, and
//           is a launch of its own beside many
// Budget    weights of the experts that are visited once (Flash, one token: 75 MB FP4 and 25 MB
// FP8,
//           24 us); many tokens: 150 MFLOP per visit on the tensor cores
// Contract  bf16 activations; experts alike in type and shape, 16-byte aligned rows
// Numerics  linear.h; swiglu in f32, rounded to act, then quantised; sums in f32, one rounding.
//           A token's bits do not depend on the others: their order inside an expert only moves
//           rows
#include <algorithm>

#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_quantise-inl.h"
#include "backends/nvidia/ops/linear_stream-inl.h"
#include "backends/nvidia/ops/linear_tile128-inl.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4::nvidia {
namespace {

constexpr int kMaxExperts = 512;
constexpr int64_t kTokensAtOnce = 2048;           // bounds scratch; more tokens go in turns
constexpr int kSharedInTiles = kMaxStreamTokens;  // up to so many tokens the shared expert joins
constexpr int kSortThreads = 1024;

// Consecutive rows (sorted visits) that go to one expert.
struct TokenTile {
  int32_t expert;
  int32_t begin, end;
};

// Scratch of a call. Row v of the buffers is sorted visit v; rows of the shared expert follow.
struct MoeBuffers {
  int64_t tokens, rows;
  uint16_t* x;         // [tokens, n] quantised input
  float* up;           // [2][rows, inter]: w1 x and w3 x; later y [rows, n] of w2
  uint16_t* a;         // [rows, inter]
  int32_t* visit_of;   // [rows] token * k + i; shared: -1
  int32_t* token_of;   // [rows]
  int32_t* row_of;     // [tokens * k] row of a visit
  TokenTile* tiles;    // [max_tiles]
  int32_t* num_tiles;  // [1]

  MoeBuffers(Arena& arena, int64_t step_tokens, int64_t k, int64_t experts, int64_t n,
             int64_t inter)
      : tokens(std::min(step_tokens, kTokensAtOnce)),
        rows(tokens * (k + 1)),
        x(arena.take_array<uint16_t>(tokens * n)),
        up(arena.take_array<float>(rows * std::max(2 * inter, n))),
        a(arena.take_array<uint16_t>(rows * inter)),
        visit_of(arena.take_array<int32_t>(rows)),
        token_of(arena.take_array<int32_t>(rows)),
        row_of(arena.take_array<int32_t>(tokens * k)),
        tiles(arena.take_array<TokenTile>(max_tiles(tokens, k, experts, 8))),
        num_tiles(arena.take_array<int32_t>(1)) {}

  // Every visited expert has one tile that is not full at most.
  static int64_t max_tiles(int64_t tokens, int64_t k, int64_t experts, int64_t tile_tokens) {
    return std::min(tokens * k, experts) + tokens * k / tile_tokens +
           ceil_div(std::min<int64_t>(tokens, kSharedInTiles), tile_tokens);
  }
};

// ---- sort

struct SortParams {
  const int32_t* expert_ids;
  int64_t ids_stride;
  int32_t tokens, k, experts;
  int32_t tile_tokens;
  int32_t shared_tokens;  // of the shared expert's tiles, rows from tokens * k on
  int32_t *visit_of, *token_of, *row_of, *num_tiles;
  TokenTile* tiles;
};

// Sum over the threads before this one; *total gets the sum over all. `warps` holds 32 numbers.
__device__ int exclusive_sum(int value, int* warps, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int of_warp = warps[lane];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, of_warp, distance);
      if (lane >= distance) of_warp += other;
    }
    warps[lane] = of_warp;
  }
  __syncthreads();
  const int before = warp == 0 ? 0 : warps[warp - 1];
  *total = warps[31];
  __syncthreads();
  return before + sum - value;
}

__global__ void __launch_bounds__(kSortThreads) moe_sort(const SortParams params) {
  __shared__ int counts[kMaxExperts], next[kMaxExperts], warps[32];
  const auto thread = static_cast<int>(threadIdx.x);
  const int visits = params.tokens * params.k;
  for (int e = thread; e < kMaxExperts; e += kSortThreads) counts[e] = 0;
  __syncthreads();
  const auto expert_of = [&](int visit) {
    return params.expert_ids[visit / params.k * params.ids_stride + visit % params.k];
  };
  for (int v = thread; v < visits; v += kSortThreads) atomicAdd(&counts[expert_of(v)], 1);
  __syncthreads();
  const int count = thread < params.experts ? counts[thread] : 0;
  const int tiles = (count + params.tile_tokens - 1) / params.tile_tokens;
  int total_rows, total_tiles;
  const int first_row = exclusive_sum(count, warps, &total_rows);
  const int first_tile = exclusive_sum(tiles, warps, &total_tiles);
  if (thread < params.experts) next[thread] = first_row;
  for (int i = 0; i < tiles; ++i) {
    const int begin = first_row + i * params.tile_tokens;
    params.tiles[first_tile + i] = {thread, begin,
                                    min(begin + params.tile_tokens, first_row + count)};
  }
  __syncthreads();
  for (int v = thread; v < visits; v += kSortThreads) {
    const int row = atomicAdd(&next[expert_of(v)], 1);
    params.visit_of[row] = v;
    params.token_of[row] = v / params.k;
    params.row_of[v] = row;
  }
  for (int t = thread; t < params.tokens; t += kSortThreads) {
    params.visit_of[visits + t] = -1;
    params.token_of[visits + t] = t;
  }
  const int shared_tiles = (params.shared_tokens + params.tile_tokens - 1) / params.tile_tokens;
  for (int i = thread; i < shared_tiles; i += kSortThreads) {
    const int begin = i * params.tile_tokens;
    params.tiles[total_tiles + i] = {
        params.experts, visits + begin,
        visits + min(begin + params.tile_tokens, params.shared_tokens)};
  }
  if (thread == 0) *params.num_tiles = total_tiles + shared_tiles;
}

// ---- products

// w1 and w3, or w2, of all experts; `kinds` are the routed and the shared one but for the pointers.
struct ExpertsParams {
  int32_t matrices;
  LinearWeight kinds[2];
  const uint8_t* data[2][kMaxExperts + 1];  // the shared expert is the last
  const uint8_t* scale[2][kMaxExperts + 1];
  int32_t experts;
  const uint16_t* x;
  int64_t x_stride;
  const int32_t* x_rows;  // null: row of x = row of out
  float* out;             // [matrices][rows, n]
  int64_t out_rows;
  const TokenTile* tiles;
  const int32_t* num_tiles;
};
static_assert(sizeof(ExpertsParams) < 32764, "fits the parameters of a kernel");

// Calls body(tile) for this block's share: row tiles fastest, so that neighbours stream one expert.
template <typename TileRows, typename Body>
__device__ __forceinline__ void for_expert_tiles(const ExpertsParams& params, TileRows tile_rows,
                                                 Body body) {
  const int rows = params.kinds[0].rows, row_tile = tile_rows(params.kinds[0].cols);
  const int row_tiles = (rows + row_tile - 1) / row_tile;
  const int64_t total = int64_t{*params.num_tiles} * params.matrices * row_tiles;
  for (int64_t idx = blockIdx.x; idx < total; idx += gridDim.x) {
    const auto i = static_cast<int>(idx / row_tiles);
    const TokenTile tokens = params.tiles[i / params.matrices];
    const int matrix = i % params.matrices;
    LinearWeight w = params.kinds[tokens.expert == params.experts ? 1 : 0];
    w.data = params.data[matrix][tokens.expert];
    w.scale = params.scale[matrix][tokens.expert];
    body(LinearTile{.w = &w,
                    .x = params.x,
                    .x_stride = params.x_stride,
                    .x_rows = params.x_rows,
                    .out = params.out + matrix * params.out_rows * rows,
                    .out_stride = rows,
                    .out_f32 = true,
                    .row0 = static_cast<int>(idx % row_tiles) * row_tile,
                    .token0 = tokens.begin,
                    .token_end = tokens.end});
    __syncthreads();  // the next tile reuses the shared memory
  }
}

// With few tokens short rings, so that three blocks fit a multiprocessor.
template <int kM>
constexpr int kStreamDepth = kM == 1 ? 3 : 4;

template <int kM, int kN>
__global__ void __launch_bounds__(kStreamWarps * 32, kM == 1 ? 3 : 1)
    moe_stream(const __grid_constant__ ExpertsParams params) {
  extern __shared__ __align__(128) std::byte shared[];
  for_expert_tiles(
      params, [](int cols) { return stream_tile_rows(cols, kM); },
      [&](const LinearTile& tile) {
        switch (tile.w->dtype) {
          case DType::kBf16:
            return stream_tile<DType::kBf16, kM, kN, kStreamDepth<kM>>(tile, shared, [] {});
          case DType::kF8E4M3:
            return stream_tile<DType::kF8E4M3, kM, kN, kStreamDepth<kM>>(tile, shared, [] {});
          default:
            return stream_tile<DType::kF4E2M1, kM, kN, kStreamDepth<kM>>(tile, shared, [] {});
        }
      });
}

template <int kTokens>
__global__ void __launch_bounds__(kTileThreads, 1)
    moe_tile(const __grid_constant__ ExpertsParams params) {
  extern __shared__ __align__(128) std::byte shared[];
  for_expert_tiles(
      params, [](int) { return kTileRows; },
      [&](const LinearTile& tile) {
        switch (tile.w->dtype) {
          case DType::kBf16:
            return tile128<DType::kBf16, kTokens>(tile, shared);
          case DType::kF8E4M3:
            return tile128<DType::kF8E4M3, kTokens>(tile, shared);
          default:
            return tile128<DType::kF4E2M1, kTokens>(tile, shared);
        }
      });
}

// ---- between and after

struct SwigluParams {
  const float* up;
  int64_t rows;
  int32_t inter;
  const int32_t* visit_of;
  const float* expert_weights;
  int64_t weights_stride;
  int32_t k;
  float limit;
  bool quantise;
  uint16_t* a;
};

__global__ void __launch_bounds__(256) moe_swiglu(const SwigluParams params) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int groups = (params.inter + kQuantiseGroup - 1) / kQuantiseGroup;
  const int64_t idx = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  const int64_t row = idx / groups;
  if (row >= params.rows) return;
  const int visit = params.visit_of[row];
  const float weight =
      visit < 0
          ? 1.0f
          : params.expert_weights[visit / params.k * params.weights_stride + visit % params.k];
  const int col = static_cast<int>(idx % groups) * kQuantiseGroup + lane * kQuantiseCols;
  const float* gates = params.up + row * params.inter + col;
  const float* ups = gates + params.rows * params.inter;
  float values[kQuantiseCols];
#pragma unroll
  for (int i = 0; i < kQuantiseCols; ++i) {
    float g = col + i < params.inter ? gates[i] : 0.0f;
    float u = col + i < params.inter ? ups[i] : 0.0f;
    if (params.limit > 0) {  // comparisons that NaN passes through
      g = g > params.limit ? params.limit : g;
      u = u > params.limit ? params.limit : u < -params.limit ? -params.limit : u;
    }
    const float sigmoid = __fdiv_rn(1.0f, 1.0f + expf(-g));
    const float value = __fmul_rn(__fmul_rn(__fmul_rn(g, sigmoid), u), weight);
    values[i] = bf16_to_float(float_to_bf16(value));
  }
  if (params.quantise) quantise_group(values);
  uint16_t* a = params.a + row * params.inter + col;
#pragma unroll
  for (int i = 0; i < kQuantiseCols; ++i) {
    if (col + i < params.inter) a[i] = float_to_bf16(values[i]);
  }
}

struct CombineParams {
  const float* y;  // [rows, n]
  const int32_t* row_of;
  int32_t tokens, k, n;
  bool shared;
  uint16_t* out;
  int64_t out_stride;
};

__global__ void __launch_bounds__(256) moe_combine(const CombineParams params) {
  const int token = static_cast<int>(blockIdx.x);
  for (int col = static_cast<int>(blockIdx.y * 256 + threadIdx.x); col < params.n;
       col += static_cast<int>(gridDim.y) * 256) {
    float sum = 0;
    if (params.shared) sum = params.y[(int64_t{params.tokens} * params.k + token) * params.n + col];
    for (int i = 0; i < params.k; ++i) {
      const int64_t row = params.row_of[token * params.k + i];
      sum = __fadd_rn(sum, params.y[row * params.n + col]);
    }
    params.out[token * params.out_stride + col] = float_to_bf16(sum);
  }
}

// ---- the host's part

template <int kM, int kN>
int stream_shared_bytes(const LinearWeight& w) {
  const int ring = w.dtype == DType::kBf16
                       ? StreamShape<DType::kBf16, kM, kN, kStreamDepth<kM>>::kWarpBytes
                   : w.dtype == DType::kF8E4M3
                       ? StreamShape<DType::kF8E4M3, kM, kN, kStreamDepth<kM>>::kWarpBytes
                       : StreamShape<DType::kF4E2M1, kM, kN, kStreamDepth<kM>>::kWarpBytes;
  const int scales =
      w.scale == nullptr ? 0 : 16 * kM * stream_scale_cols(w.cols, w.block_cols_log2);
  return kStreamWarps * (ring + scales);
}

template <int kTokens>
int tile_shared_bytes(const LinearWeight& w) {
  return w.dtype == DType::kBf16     ? TileShape<DType::kBf16, kTokens>::kSharedBytes
         : w.dtype == DType::kF8E4M3 ? TileShape<DType::kF8E4M3, kTokens>::kSharedBytes
                                     : TileShape<DType::kF4E2M1, kTokens>::kSharedBytes;
}

// Tokens of a tile, by what an expert gets on average: a property of speed, not of bits.
int choose_tile_tokens(int64_t visits, int64_t experts) {
  const int64_t average = experts == 0 ? 0 : visits / experts;
  return average <= 8 ? 8 : average <= 16 ? 16 : average <= 64 ? 64 : 128;
}

class MoeCall {
 public:
  MoeCall(const MoeParams& params, const MoeBuffers& buffers, cudaStream_t stream)
      : params_(params),
        buffers_(buffers),
        stream_(stream),
        experts_(static_cast<int>(params.experts.size())),
        k_(experts_ == 0 ? 0 : params.expert_ids.shape[1]),
        n_(params.x.shape[1]),
        inter_((experts_ == 0 ? params.shared : params.experts[0]).w1.rows) {
    up_.matrices = 2;
    add_weights(up_, 0, &ExpertWeights::w1);
    add_weights(up_, 1, &ExpertWeights::w3);
    down_.matrices = 1;
    add_weights(down_, 0, &ExpertWeights::w2);
  }

  void run(int64_t first, int64_t tokens) {
    const auto visits = tokens * k_;
    const bool shared = static_cast<bool>(params_.shared.w1);
    const bool shared_in_tiles = shared && tokens <= kSharedInTiles;
    const int tile_tokens = choose_tile_tokens(visits, experts_);
    moe_sort<<<1, kSortThreads, 0, stream_>>>(
        {.expert_ids =
             experts_ == 0 ? nullptr : params_.expert_ids.rows(first, tokens).as<int32_t>(),
         .ids_stride = params_.expert_ids.strides[0],
         .tokens = static_cast<int32_t>(tokens),
         .k = static_cast<int32_t>(k_),
         .experts = experts_,
         .tile_tokens = tile_tokens,
         .shared_tokens = shared_in_tiles ? static_cast<int32_t>(tokens) : 0,
         .visit_of = buffers_.visit_of,
         .token_of = buffers_.token_of,
         .row_of = buffers_.row_of,
         .num_tiles = buffers_.num_tiles,
         .tiles = buffers_.tiles});
    DSV4_CUDA_CHECK_LAUNCH();
    const ConstTensor x = params_.x.rows(first, tokens);
    launch_linear_prepare({.x = x.as<uint16_t>(),
                           .x_stride = x.strides[0],
                           .out = buffers_.x,
                           .out_stride = n_,
                           .rows = static_cast<int32_t>(tokens),
                           .cols = static_cast<int32_t>(n_),
                           .quantise = params_.quantise_input},
                          stream_);
    const int64_t rows = visits + (shared ? tokens : 0);
    const int64_t max_tiles = MoeBuffers::max_tiles(tokens, k_, experts_, tile_tokens);
    up_.x = buffers_.x;
    up_.x_stride = n_;
    up_.x_rows = buffers_.token_of;
    multiply(up_, tile_tokens, max_tiles, buffers_.up, rows);
    if (shared && !shared_in_tiles) {
      LinearBatch batch;
      for (const Weight* w : {&params_.shared.w1, &params_.shared.w3}) {
        float* out = buffers_.up + (batch.count * rows + visits) * inter_;
        batch.items[batch.count++] = item(*w, buffers_.x, n_, out, tokens);
      }
      launch_linear_fast(batch, tokens, stream_);
    }

    const int64_t groups = rows * ceil_div(inter_, kQuantiseGroup);
    const ConstTensor weights =
        experts_ == 0 ? ConstTensor() : params_.expert_weights.rows(first, tokens);
    moe_swiglu<<<static_cast<unsigned>(ceil_div(groups, 8)), 256, 0, stream_>>>(
        {.up = buffers_.up,
         .rows = rows,
         .inter = static_cast<int32_t>(inter_),
         .visit_of = buffers_.visit_of,
         .expert_weights = weights.as<float>(),
         .weights_stride = weights.strides[0],
         .k = static_cast<int32_t>(k_),
         .limit = params_.swiglu_limit,
         .quantise = params_.quantise_input,
         .a = buffers_.a});
    DSV4_CUDA_CHECK_LAUNCH();

    down_.x = buffers_.a;
    down_.x_stride = inter_;
    down_.x_rows = nullptr;
    multiply(down_, tile_tokens, max_tiles, buffers_.up, rows);
    if (shared && !shared_in_tiles) {
      LinearBatch batch;
      batch.items[batch.count++] = item(params_.shared.w2, buffers_.a + visits * inter_, inter_,
                                        buffers_.up + visits * n_, tokens);
      launch_linear_fast(batch, tokens, stream_);
    }
    const Tensor out = params_.out.rows(first, tokens);
    const dim3 grid(static_cast<unsigned>(tokens),
                    static_cast<unsigned>(std::min<int64_t>(4, ceil_div(n_, 256))));
    moe_combine<<<grid, 256, 0, stream_>>>({.y = buffers_.up,
                                            .row_of = buffers_.row_of,
                                            .tokens = static_cast<int32_t>(tokens),
                                            .k = static_cast<int32_t>(k_),
                                            .n = static_cast<int32_t>(n_),
                                            .shared = shared,
                                            .out = out.as<uint16_t>(),
                                            .out_stride = out.strides[0]});
    DSV4_CUDA_CHECK_LAUNCH();
  }

 private:
  // Pointers of one matrix of every expert, which are alike in all else.
  void add_weights(ExpertsParams& to, int matrix, Weight ExpertWeights::*which) {
    const auto add = [&](int kind, int idx, const Weight& weight) {
      const LinearWeight w = linear_weight(weight);
      DSV4_CHECK(tensor_cores_take(weight));
      LinearWeight& like = to.kinds[kind];
      if (like.data == nullptr) like = w;
      DSV4_CHECK(w.dtype == like.dtype && w.rows == like.rows && w.cols == like.cols &&
                 w.row_bytes == like.row_bytes && w.scale_stride == like.scale_stride &&
                 w.block_rows == like.block_rows && w.block_cols == like.block_cols);
      to.data[matrix][idx] = w.data;
      to.scale[matrix][idx] = w.scale;
    };
    to.experts = experts_;
    for (int e = 0; e < experts_; ++e) add(0, e, params_.experts[static_cast<size_t>(e)].*which);
    if (params_.shared.w1) add(1, experts_, params_.shared.*which);
    if (experts_ == 0) to.kinds[0] = to.kinds[1];
    if (!params_.shared.w1) to.kinds[1] = to.kinds[0];
    DSV4_CHECK(to.kinds[0].rows == to.kinds[1].rows && to.kinds[0].cols == to.kinds[1].cols);
  }

  LinearItem item(const Weight& w, const uint16_t* x, int64_t x_stride, float* out,
                  int64_t tokens) const {
    return {.w = linear_weight(w),
            .x = x,
            .x_stride = x_stride,
            .out = out,
            .out_stride = w.rows,
            .tokens = static_cast<int32_t>(tokens),
            .first_tile = 0,
            .x_f32 = false,
            .out_f32 = true};
  }

  void multiply(ExpertsParams& params, int tile_tokens, int64_t max_tiles, float* out,
                int64_t out_rows) {
    params.out = out;
    params.out_rows = out_rows;
    params.tiles = buffers_.tiles;
    params.num_tiles = buffers_.num_tiles;
    if (tile_tokens == 8) {
      launch(moe_stream<1, 1>, params, max_tiles, stream_tile_rows(params.kinds[0].cols, 1),
             shared_bytes(params, stream_shared_bytes<1, 1>), 8);
    } else if (tile_tokens == 16) {
      launch(moe_stream<2, 2>, params, max_tiles, stream_tile_rows(params.kinds[0].cols, 2),
             shared_bytes(params, stream_shared_bytes<2, 2>), 4);
    } else if (tile_tokens == 64) {
      launch(moe_tile<64>, params, max_tiles, kTileRows,
             shared_bytes(params, tile_shared_bytes<64>), 1);
    } else {
      launch(moe_tile<128>, params, max_tiles, kTileRows,
             shared_bytes(params, tile_shared_bytes<128>), 1);
    }
  }

  template <typename BytesOf>
  static int shared_bytes(const ExpertsParams& params, BytesOf bytes_of) {
    return std::max(bytes_of(params.kinds[0]), bytes_of(params.kinds[1]));
  }

  template <typename Kernel>
  void launch(Kernel kernel, const ExpertsParams& params, int64_t max_tiles, int tile_rows,
              int bytes, int blocks_per_multiprocessor) const {
    const int64_t tiles = max_tiles * params.matrices * ceil_div(params.kinds[0].rows, tile_rows);
    const int64_t blocks =
        std::min<int64_t>(tiles, int64_t{num_multiprocessors()} * blocks_per_multiprocessor);
    allow_shared_memory(kernel, bytes);
    kernel<<<static_cast<unsigned>(blocks), kStreamWarps * 32, static_cast<size_t>(bytes),
             stream_>>>(params);
    DSV4_CUDA_CHECK_LAUNCH();
  }

  const MoeParams& params_;
  const MoeBuffers& buffers_;
  cudaStream_t stream_;
  int experts_;
  int64_t k_, n_, inter_;
  ExpertsParams up_{}, down_{};
};
static_assert(kStreamWarps * 32 == kTileThreads);

void moe(const MoeParams& params, const OpContext& context) {
  const int64_t tokens = params.x.shape[0];
  if (tokens == 0) return;
  const auto experts = static_cast<int64_t>(params.experts.size());
  const int64_t inter = (experts == 0 ? params.shared : params.experts[0]).w1.rows;
  const int64_t k = experts == 0 ? 0 : params.expert_ids.shape[1];
  const Arena::Scope scope(*context.scratch);
  const MoeBuffers buffers(*context.scratch, tokens, k, experts, params.x.shape[1], inter);
  if (context.scratch->measuring()) return;
  DSV4_CHECK(params.x.dtype == DType::kBf16 && params.out.dtype == DType::kBf16);
  DSV4_CHECK(experts <= kMaxExperts);
  MoeCall call(params, buffers, stream_of(context.stream));
  for (int64_t first = 0; first < tokens; first += buffers.tokens)
    call.run(first, std::min(buffers.tokens, tokens - first));
}

void install(Ops& ops) {
  ops.moe = moe;
}

}  // namespace

std::span<const Candidate> moe_candidates() {
  static constexpr Candidate kCandidates[] = {{"moe", "sm80", needs_sm80, install}};
  return kCandidates;
}

int64_t moe_scratch_bytes(const ScratchLimits& limits) {
  if (limits.moe_intermediate == 0 || limits.max_tokens == 0) return 0;
  Arena measure;
  const MoeBuffers buffers(measure, limits.max_tokens, limits.experts_per_token, limits.num_experts,
                           limits.hidden_size, limits.moe_intermediate);
  return measure.peak();
}

}  // namespace dsv4::nvidia
