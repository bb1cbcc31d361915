// Indexer scores: checks of the arguments, the reference kernel, the list of candidates.
#include <bit>

#include "backends/nvidia/ops/families.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "backends/nvidia/ops/index_logits.h"
#include "backends/nvidia/ops/launch.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/numbers.h"

namespace dsv4::nvidia {
namespace {

// ---- reference: 32 keys in f32 in shared memory; a lane of 8 takes every eighth head.

constexpr int kDim = 128, kMaxHeads = 64;
constexpr int kTileKeys = 32, kHeadLanes = 8;
constexpr int kThreads = kTileKeys * kHeadLanes;

struct ReferenceStorage {
  float q[kMaxHeads][kDim];
  float keys[kTileKeys][kDim + 1];  // + 1: the keys of a warp lie in different banks
  float sums[kHeadLanes][kTileKeys];
};

__device__ float e4m3_value(uint32_t code) {
  const uint32_t size = code & 0x7f;
  const float value =
      size == 0x7f ? __uint_as_float(0x7fc00000) : __uint_as_float(size << 20) * 0x1p120f;
  return (code & 0x80) != 0 ? -value : value;
}
__device__ float e2m1_value(uint32_t code) {
  const float value = __uint_as_float((code & 7) << 22) * 0x1p126f;
  return (code & 8) != 0 ? -value : value;
}
__device__ float e8m0_value(uint32_t byte) {
  return byte == 255 ? __uint_as_float(0x7fc00000)
                     : __uint_as_float(byte == 0 ? 0x00400000 : byte << 23);
}

// One element of an entry without FP8's scale.
__device__ float key_value(const std::byte* page, int32_t rows, int32_t row, int d, bool fp8) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(page);
  if (fp8) return e4m3_value(bytes[int64_t{row} * kDim + d]);
  const uint32_t pair = bytes[int64_t{row} * (kDim / 2) + d / 2];
  const uint32_t scale = bytes[int64_t{rows} * (kDim / 2) + row * 4 + d / 32];
  return e2m1_value(d % 2 == 0 ? pair : pair >> 4) * e8m0_value(scale);
}

__global__ void __launch_bounds__(kThreads)
    reference_index_logits(const __grid_constant__ IndexLogitsArgs args, bool fp8) {
  extern __shared__ __align__(16) std::byte shared[];
  auto& storage = *reinterpret_cast<ReferenceStorage*>(shared);
  const int64_t token = blockIdx.y;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kTileKeys;
  const int32_t visible = min(args.end[token], args.max_end);
  if (first >= visible) return;
  const int32_t* table = args.table + args.token_to_seq[token] * args.table_stride;
  const auto page_of = [&](int32_t entry) {
    return args.cache + table[entry / args.rows_per_block] * args.block_stride_bytes;
  };
  for (int i = threadIdx.x; i < args.num_heads * kDim; i += kThreads) {
    const uint32_t bits =
        args.q[token * args.q_token_stride + i / kDim * args.q_head_stride + i % kDim];
    storage.q[i / kDim][i % kDim] = __uint_as_float(bits << 16);
  }
  for (int i = threadIdx.x; i < kTileKeys * kDim; i += kThreads) {
    const int32_t entry = first + i / kDim;
    storage.keys[i / kDim][i % kDim] = entry < visible
                                           ? key_value(page_of(entry), args.rows_per_block,
                                                       entry % args.rows_per_block, i % kDim, fp8)
                                           : 0.0f;
  }
  __syncthreads();
  const int key = threadIdx.x % kTileKeys, lane = threadIdx.x / kTileKeys;
  float sum = 0;
  for (int h = lane; h < args.num_heads; h += kHeadLanes) {
    float dot = 0;
    for (int d = 0; d < kDim; ++d) dot = __fmaf_rn(storage.q[h][d], storage.keys[key][d], dot);
    const float positive = dot < 0 ? 0.0f : dot;  // NaN stays
    sum = __fmaf_rn(args.weights[token * args.weights_stride + h], positive, sum);
  }
  storage.sums[lane][key] = sum;
  __syncthreads();
  const int32_t entry = first + key;
  if (lane != 0 || entry >= visible) return;
  for (int l = 1; l < kHeadLanes; ++l) sum += storage.sums[l][key];
  if (fp8) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(page_of(entry)) +
                        int64_t{args.rows_per_block} * kDim + entry % args.rows_per_block * 4;
    sum *= __uint_as_float(bytes[0] | bytes[1] << 8 | bytes[2] << 16 |
                           static_cast<uint32_t>(bytes[3]) << 24);
  }
  args.logits[token * args.logits_stride + entry] = sum;
}

// ---- queries that are E4M3 codes

__global__ void __launch_bounds__(256)
    index_query_values(const uint8_t* codes, int64_t token_stride, int64_t head_stride,
                       int32_t heads, int64_t count, uint16_t* values) {
  follow_kernels_before();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / kDim;
  const uint8_t code = codes[row / heads * token_stride + row % heads * head_stride + i % kDim];
  values[i] = static_cast<uint16_t>(__float_as_uint(e4m3_value(code)) >> 16);  // exact
}

}  // namespace

Bf16Queries::Bf16Queries(const IndexLogitsParams& params, const OpContext& context)
    : scope_(*context.scratch), params_(params) {
  const ConstTensor& q = params.q;
  if (q.dtype != DType::kF8E4M3) return;
  const int64_t tokens = q.shape[0], heads = q.shape[1], count = tokens * heads * q.shape[2];
  DSV4_CHECK(q.shape[2] == kDim && q.strides[2] == 1);
  const Tensor values = context.scratch->take_tensor(DType::kBf16, {tokens, heads, q.shape[2]});
  params_.q = values;
  if (context.scratch->measuring() || count == 0) return;
  launch<index_query_values>({dim3(static_cast<unsigned>(ceil_div(count, int64_t{256}))), 256},
                             stream_of(context.stream), q.as<uint8_t>(), q.strides[0], q.strides[1],
                             static_cast<int32_t>(heads), count, values.as<uint16_t>());
}

IndexLogitsArgs index_logits_args(const IndexLogitsParams& params) {
  const CacheView& cache = params.cache;
  DSV4_CHECK(cache.format == KvFormat::kIndexFp8 || cache.format == KvFormat::kIndexMxfp4);
  const bool is_bf16 = params.q.dtype == DType::kBf16;
  DSV4_CHECK((is_bf16 || params.q.dtype == DType::kF8E4M3) && params.q.strides[2] == 1);
  DSV4_CHECK(params.q.shape[2] == kDim && cache.row_elems == kDim);
  DSV4_CHECK(params.q.shape[1] >= 1 && params.q.shape[1] <= kMaxHeads);
  const auto rows = static_cast<uint32_t>(cache.rows_per_block);
  return {.q = is_bf16 ? params.q.as<uint16_t>() : nullptr,
          .q_token_stride = params.q.strides[0],
          .q_head_stride = params.q.strides[1],
          .weights = params.weights.as<float>(),
          .weights_stride = params.weights.strides[0],
          .token_to_seq = params.token_to_seq,
          .end = params.end,
          .num_tokens = static_cast<int32_t>(params.q.shape[0]),
          .num_heads = static_cast<int32_t>(params.q.shape[1]),
          .max_end = params.max_end,
          .table = params.blocks.table,
          .table_stride = params.blocks.stride,
          .table_columns = params.blocks.columns,
          .cache = cache.base,
          .block_stride_bytes = cache.block_stride_bytes,
          .rows_per_block = cache.rows_per_block,
          .rows_shift = std::has_single_bit(rows) ? std::countr_zero(rows) : -1,
          .logits = params.logits.as<float>(),
          .logits_stride = params.logits.strides[0],
          .group_tokens = 1,
          .splits = 1};
}

bool index_rows_aligned(const IndexLogitsParams& params) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return aligned(params.cache.base) && params.cache.block_stride_bytes % 16 == 0 &&
         aligned(params.q.data) && params.q.strides[0] * size_of(params.q.dtype) % 16 == 0 &&
         params.q.strides[1] * size_of(params.q.dtype) % 16 == 0;
}

void index_logits_reference(const IndexLogitsParams& given, const OpContext& context) {
  const Bf16Queries queries(given, context);
  const IndexLogitsParams& params = queries.params();
  const IndexLogitsArgs args = index_logits_args(params);
  if (context.scratch->measuring() || args.num_tokens == 0 || args.max_end == 0) return;
  constexpr int kBytes = sizeof(ReferenceStorage);
  DSV4_CUDA_CHECK(cudaFuncSetAttribute(reference_index_logits,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  // blockIdx.y ends at 65535: tokens of a tile are fewer.
  DSV4_CHECK(args.num_tokens <= 65535);
  const dim3 grid(static_cast<unsigned>(ceil_div(args.max_end, kTileKeys)),
                  static_cast<unsigned>(args.num_tokens));
  reference_index_logits<<<grid, kThreads, kBytes, stream_of(context.stream)>>>(
      args, params.cache.format == KvFormat::kIndexFp8);
  DSV4_CUDA_CHECK_LAUNCH();
}

std::span<const Candidate> index_logits_candidates() {
  static const Candidate list[] = {
      {"index_logits", "sm90", needs_sm90,
       [](Ops& ops) {
         ops.index_logits = index_logits_sm90;
         ops.index_takes_e4m3 = true;
       }},
      {"index_logits", "sm80", needs_sm80,
       [](Ops& ops) {
         ops.index_logits = index_logits_sm80;
         ops.index_takes_e4m3 = false;
       }},
      {"index_logits", "reference", needs_sm80,
       [](Ops& ops) {
         ops.index_logits = index_logits_reference;
         ops.index_takes_e4m3 = false;
       }},
  };
  return list;
}

int64_t index_logits_scratch_bytes(const ScratchLimits& limits) {
  // Queries of the other form.
  const int64_t values = limits.max_tokens * limits.index_heads * limits.index_dim;
  return round_up(2 * values, Arena::kAlignment);
}

}  // namespace dsv4::nvidia
