// sm90_linear_fp8: products of FP8 weights with quantised input, for any number of tokens.
//
// Problem   out[m, n] = sum_b sx[m, b] sw[n / 128, b] sum_{k in block b} x[m, k] W[n, k], E4M3
//           codes, blocks of 128 columns
// Tiling    block = 128 rows of W x kN tokens (8 .. 128): W is the A operand of wgmma (64 rows a
//           warpgroup), tokens are its N, so one order serves every number of tokens.
//           Warpgroup 0 copies (cp.async: any stride, zero beyond the ends), 1 and 2 multiply.
//           Few tokens: a cluster of blocks shares K, one segment each; sums are exchanged through
//           distributed shared memory and added in ascending order.
//           Many: blocks walk over tiles and take all segments of each
// Budget    few tokens: bytes of W at 4.27 TB/s, 80 KB in flight a block, two blocks an SM;
//           128 x 128 x 128: 8 products of 64 clocks, beside 112 instructions a warp that add them
// Launch    384 threads; grid tiles * segments in clusters, or min(tiles, SMs); may start before
// the
//           kernel that prepares x has ended, and reads W meanwhile
// Contract  fp8_tensor_cores_take(); x as Fp8Item says
// Numerics  linear_sm90.h. The FP8 tensor cores keep about 14 bits of a sum inside a block
#include <cuda_bf16.h>

#include <algorithm>

#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/cluster.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/launch.h"
#include "backends/nvidia/ops/linear_sm90.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace {

constexpr int kRows = 128;  // of a tile: 64 for each multiplying warpgroup
constexpr int kGroupThreads = 128;
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kWBytes = kRows * kFp8Block;

template <int kN>
struct Traits {
  static constexpr int kXBytes = kN * kFp8Block;
  static constexpr int kScaleBytes = kN * 4 < 128 ? 128 : kN * 4;
  // W first: every operand starts at a multiple of 1024 bytes.
  static constexpr int kStages = kN == 64 ? 3 : kN >= 32 ? 4 : 5;
  static constexpr int kSumStride = kRows + 4;  // floats between tokens: 4 spreads the banks
  static constexpr int kBlocksPerSm = kN == 128 ? 1 : 2;
};

template <int kN>
struct SharedStorage {
  using T = Traits<kN>;
  alignas(1024) std::byte w[T::kStages][kWBytes];
  alignas(1024) std::byte x[T::kStages][T::kXBytes];
  alignas(16) float x_scales[T::kStages][T::kScaleBytes / 4];
  alignas(16) float sums[kN][T::kSumStride];
  uint64_t full[T::kStages], empty[T::kStages];
};

// A tile of a product, and the blocks of K that this thread block takes.
struct Work {
  const Fp8Item* item;
  int row0, token0;
  int block_begin, block_end;
};

// `stage` and `phase` of the ring; both sides step alike.
struct Place {
  int stage = 0;
  uint32_t phase = 0;
  template <int kStages>
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Fills the ring with the blocks of `work`. `first`: of this thread block; W does not depend on
// earlier kernels, so as much of it as fits is asked for before they have ended.
template <int kN>
__device__ __forceinline__ void copy_tile(const Work& work, bool first, SharedStorage<kN>& shared,
                                          Place& place) {
  using T = Traits<kN>;
  const Fp8Item& item = *work.item;
  const LinearWeight& w = item.w;
  const int thread = static_cast<int>(threadIdx.x);
  const int unit = thread % 8, row = thread / 8;  // rows row, row + 16, ..; row % 8 stays
  const uint32_t offset = row * kFp8Block + (unit ^ (row & 7)) * 16;
  const int64_t w_step = 16 * w.row_bytes, x_step = 16 * item.x_stride;
  const auto copy_w = [&](int block, int stage) {
    const int col = block * kFp8Block + unit * 16;
    const int valid = max(0, min(16, w.cols - col));
    const uint8_t* from = w.data + (work.row0 + row) * w.row_bytes + col;
    const uint32_t to = sm80::shared_address(shared.w[stage]) + offset;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      sm80::copy_async_stream(to + i * 16 * kFp8Block, from + i * w_step,
                              work.row0 + row + 16 * i < w.rows ? valid : 0);
    }
  };
  const int early = first ? min(T::kStages, work.block_end - work.block_begin) : 0;
  for (int i = 0; i < early; ++i) copy_w(work.block_begin + i, i);
  if (first) sm90::wait_for_kernels_before();
  for (int block = work.block_begin; block < work.block_end; ++block) {
    if (block - work.block_begin >= early) {
      sm90::mbarrier_wait(sm80::shared_address(&shared.empty[place.stage]), place.phase ^ 1);
      copy_w(block, place.stage);
    }
    const uint8_t* x_from =
        item.x + (work.token0 + row) * item.x_stride + block * kFp8Block + unit * 16;
    const uint32_t x_to = sm80::shared_address(shared.x[place.stage]) + offset;
#pragma unroll
    for (int i = 0; i < (kN + 15) / 16; ++i) {
      if (kN % 16 != 0 && row >= kN) break;
      sm80::copy_async_stream(x_to + i * 16 * kFp8Block, x_from + i * x_step,
                              work.token0 + row + 16 * i < item.tokens ? 16 : 0);
    }
    if (thread < kN / 4) {  // four scales; beyond the last token they are padding of the row
      const int token = work.token0 + 4 * thread;
      sm80::copy_async_stream(sm80::shared_address(&shared.x_scales[place.stage][4 * thread]),
                              item.x_scales + block * item.x_scale_stride + token,
                              token < item.tokens ? 16 : 0);
    }
    sm90::mbarrier_arrive_after_copies(sm80::shared_address(&shared.full[place.stage]));
    place.advance<T::kStages>();
  }
}

// sums += the blocks [begin, end), each scaled.
template <int kN>
__device__ __forceinline__ void multiply_blocks(const Work& work, int begin, int end,
                                                SharedStorage<kN>& shared, Place& place,
                                                float (&sums)[kN / 2]) {
  using T = Traits<kN>;
  const LinearWeight& w = work.item->w;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint8_t* w_scales = w.scale + min(work.row0, w.rows - 1) / w.block_rows * w.scale_stride;
  for (int block = begin; block < end; ++block) {
    const uint32_t scale_byte = __ldg(w_scales + block);
    sm90::mbarrier_wait(sm80::shared_address(&shared.full[place.stage]), place.phase);
    sm90::fence_proxy_async();
    const uint64_t a =
        sm90::fp8_operand(sm80::shared_address(shared.w[place.stage]) + group * kWBytes / 2);
    const uint64_t b = sm90::fp8_operand(sm80::shared_address(shared.x[place.stage]));
    float block_sums[kN / 2];
#pragma unroll
    for (float& sum : block_sums) sum = 0;
    sm90::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kFp8Block / 32; ++i)
      sm90::Fp8Product<kN>::run(block_sums, a + 2 * i, b + 2 * i, i > 0);
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    const float w_scale = scale_byte == 0     ? 0x1p-127f
                          : scale_byte == 255 ? __uint_as_float(0x7fc00000u)
                                              : __uint_as_float(scale_byte << 23);
    const float* x_scales = shared.x_scales[place.stage] + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float2 scales = *reinterpret_cast<const float2*>(x_scales + 8 * j);
      const float even = __fmul_rn(scales.x, w_scale), odd = __fmul_rn(scales.y, w_scale);
      sums[4 * j] = __fmaf_rn(block_sums[4 * j], even, sums[4 * j]);
      sums[4 * j + 1] = __fmaf_rn(block_sums[4 * j + 1], odd, sums[4 * j + 1]);
      sums[4 * j + 2] = __fmaf_rn(block_sums[4 * j + 2], even, sums[4 * j + 2]);
      sums[4 * j + 3] = __fmaf_rn(block_sums[4 * j + 3], odd, sums[4 * j + 3]);
    }
    __syncwarp();
    if (lane == 0) sm90::mbarrier_arrive(sm80::shared_address(&shared.empty[place.stage]));
    place.advance<T::kStages>();
  }
}

template <int kN>
__device__ __forceinline__ void put_sums(SharedStorage<kN>& shared, const float (&sums)[kN / 2]) {
  const int thread = static_cast<int>(threadIdx.x) - kGroupThreads, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shared.sums[8 * j + 2 * (lane % 4) + i % 2][row + 8 * (i / 2)] = sums[4 * j + i];
  }
}

__device__ __forceinline__ void store(const Fp8Item& item, int token, int row, float value) {
  if (token >= item.tokens || row >= item.w.rows) return;
  const int64_t element = token * item.out_stride + row;
  if (item.out_f32) {
    static_cast<float*>(item.out)[element] = value;
  } else {
    static_cast<__nv_bfloat16*>(item.out)[element] = __float2bfloat16_rn(value);
  }
}

// Tile `tile` of the batch; tokens vary fastest.
template <int kN>
__device__ __forceinline__ Work find_work(const Fp8Batch& batch, int tile) {
  int i = 0;
  while (i + 1 < batch.count && tile >= batch.items[i + 1].first_tile) ++i;
  const Fp8Item& item = batch.items[i];
  const int token_tiles = (item.tokens + kN - 1) / kN;
  const int idx = tile - item.first_tile;
  return {.item = &item,
          .row0 = idx / token_tiles * kRows,
          .token0 = idx % token_tiles * kN,
          .block_begin = 0,
          .block_end = (item.w.cols + kFp8Block - 1) / kFp8Block};
}

template <int kN>
__device__ __forceinline__ void init_barriers(SharedStorage<kN>& shared) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < Traits<kN>::kStages; ++s) {
      sm90::mbarrier_init(sm80::shared_address(&shared.full[s]), kGroupThreads);
      sm90::mbarrier_init(sm80::shared_address(&shared.empty[s]), 2 * kGroupThreads / 32);
    }
  }
  __syncthreads();
}

template <int kN>
__global__ void __launch_bounds__(kThreads, Traits<kN>::kBlocksPerSm)
    sm90_linear_fp8_segments(const __grid_constant__ Fp8Batch batch, int segments) {
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<SharedStorage<kN>*>(raw);
  init_barriers(shared);
  const auto rank = static_cast<int>(sm90::cluster_rank());
  Work work = find_work<kN>(batch, static_cast<int>(blockIdx.x) / segments);
  const int segment_blocks = fp8_segment_blocks(work.item->w.cols);
  work.block_begin = min(rank * segment_blocks, work.block_end);
  work.block_end = min(work.block_begin + segment_blocks, work.block_end);
  Place place;
  if (threadIdx.x < kGroupThreads) {
    if constexpr (kN == 64) sm90::decrease_registers<40>();
    copy_tile(work, true, shared, place);
  } else {
    if constexpr (kN == 64) sm90::increase_registers<96>();  // 85 are an even share
    float sums[kN / 2] = {};
    multiply_blocks(work, work.block_begin, work.block_end, shared, place, sums);
    put_sums(shared, sums);
  }
  sm90::cluster_arrive();
  sm90::cluster_wait();
  const int own_segments = fp8_num_segments(work.item->w.cols);
  // Every block adds up its share of the outputs: consecutive rows of one token go together.
  const int share = (kN * kRows + segments - 1) / segments;
  const int begin = rank * share, end = min(begin + share, kN * kRows);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const int token = i / kRows, row = i % kRows;
    const uint32_t address = sm80::shared_address(&shared.sums[token][row]);
    float total = sm90::load_from_cluster(address, 0);
    for (int s = 1; s < own_segments; ++s)
      total = __fadd_rn(total, sm90::load_from_cluster(address, static_cast<uint32_t>(s)));
    store(*work.item, work.token0 + token, work.row0 + row, total);
  }
  sm90::cluster_arrive();
  sm90::cluster_wait();  // nobody leaves while others read its sums
}

template <int kN>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_linear_fp8_tiles(const __grid_constant__ Fp8Batch batch, int tiles) {
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<SharedStorage<kN>*>(raw);
  init_barriers(shared);
  Place place;
  if (threadIdx.x < kGroupThreads) {
    sm90::decrease_registers<40>();
    const auto first = static_cast<int>(blockIdx.x);
    for (int tile = first; tile < tiles; tile += static_cast<int>(gridDim.x))
      copy_tile(find_work<kN>(batch, tile), tile == first, shared, place);
  } else {
    sm90::increase_registers<232>();
    const int thread = static_cast<int>(threadIdx.x) - kGroupThreads;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const Work work = find_work<kN>(batch, tile);
      const int segments = fp8_num_segments(work.item->w.cols);
      const int segment_blocks = fp8_segment_blocks(work.item->w.cols);
      float totals[kN / 2];
      for (int s = 0; s < segments; ++s) {
        float sums[kN / 2] = {};
        const int begin = min(s * segment_blocks, work.block_end);
        multiply_blocks(work, begin, min(begin + segment_blocks, work.block_end), shared, place,
                        sums);
#pragma unroll
        for (int i = 0; i < kN / 2; ++i)
          totals[i] = s == 0 ? sums[i] : __fadd_rn(totals[i], sums[i]);
      }
      sm90::barrier_sync(1,
                         2 * kGroupThreads);  // the sums of the tile before are out
      put_sums(shared, totals);
      sm90::barrier_sync(1, 2 * kGroupThreads);
      for (int i = thread; i < kN * kRows; i += 2 * kGroupThreads)
        store(*work.item, work.token0 + i / kRows, work.row0 + i % kRows,
              shared.sums[i / kRows][i % kRows]);
    }
  }
}

int num_multiprocessors() {
  int device = 0, count = 0;
  DSV4_CUDA_CHECK(cudaGetDevice(&device));
  DSV4_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <int kN>
int number_tiles(Fp8Batch& batch) {
  int64_t tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    Fp8Item& item = batch.items[i];
    item.first_tile = static_cast<int32_t>(tiles);
    tiles += ceil_div(item.w.rows, kRows) * ceil_div(item.tokens, kN);
  }
  return static_cast<int>(tiles);
}

// In clusters of `cluster_size` blocks, before the kernels that it depends on have ended.
template <typename Kernel>
void launch(Kernel kernel, int blocks, int cluster_size, int shared_bytes, cudaStream_t stream,
            const Fp8Batch& batch, int number) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster_size);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  DSV4_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, batch, number));
}

template <int kN>
void launch_segments(Fp8Batch& batch, int segments, cudaStream_t stream) {
  const int tiles = number_tiles<kN>(batch);
  constexpr int kBytes = static_cast<int>(sizeof(SharedStorage<kN>));
  static_assert(kBytes * Traits<kN>::kBlocksPerSm <= 227 << 10);
  allow_shared_memory(sm90_linear_fp8_segments<kN>, kBytes);
  launch(sm90_linear_fp8_segments<kN>, tiles * segments, segments, kBytes, stream, batch, segments);
}

template <int kN>
void launch_tiles(Fp8Batch& batch, cudaStream_t stream) {
  const int tiles = number_tiles<kN>(batch);
  constexpr int kBytes = static_cast<int>(sizeof(SharedStorage<kN>));
  allow_shared_memory(sm90_linear_fp8_tiles<kN>, kBytes);
  launch(sm90_linear_fp8_tiles<kN>, std::min(tiles, num_multiprocessors()), 1, kBytes, stream,
         batch, tiles);
}

}  // namespace

void launch_linear_fp8(Fp8Batch& batch, cudaStream_t stream) {
  if (batch.count == 0) return;
  // A cluster's size is one number for a launch: the items of a call with fewer segments than the
  // longest leave some of its blocks without work, whose sums nobody adds.
  int segments = 0;
  int64_t tokens = 0, tiles = 0;
  for (int i = 0; i < batch.count; ++i) {
    segments = std::max(segments, fp8_num_segments(batch.items[i].w.cols));
    tokens = std::max<int64_t>(tokens, batch.items[i].tokens);
    tiles += ceil_div(batch.items[i].w.rows, kRows) * ceil_div(batch.items[i].tokens, 128);
  }
  if (tokens <= 8) return launch_segments<8>(batch, segments, stream);
  if (tokens <= 16) return launch_segments<16>(batch, segments, stream);
  if (tokens <= 32) return launch_segments<32>(batch, segments, stream);
  if (tokens <= 64) return launch_segments<64>(batch, segments, stream);
  // Whole tiles as soon as they keep most multiprocessors busy.
  if (tiles * 4 < 3 * num_multiprocessors()) return launch_segments<128>(batch, segments, stream);
  launch_tiles<128>(batch, stream);
}

}  // namespace dsv4::nvidia
