#include "bench/flash_mla.h"

#include <algorithm>
#include <cstdio>

#include "params.h"
#include "sm90/decode/sparse_fp8/splitkv_mla.h"
#include "sm90/prefill/sparse/phase1.h"
#include "smxx/decode/combine/combine.h"
#include "smxx/decode/get_decoding_sched_meta/get_decoding_sched_meta.h"

namespace dsv4::flash_mla {
namespace {

constexpr int kDim = 512, kRowBytes = 584;
constexpr float kLog2E = 1.44269504f;
// Of its schedule for sm_90: rows of a block, and what a piece of a request costs besides its
// blocks.
constexpr int kBlockRows = 64, kFixedBlocks = 5;

using Bf16 = cutlass::bfloat16_t;

int multiprocessors() {
  static const int count = [] {
    int device = 0, out = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&out, cudaDevAttrMultiProcessorCount, device);
    return out;
  }();
  return count;
}

struct Workspace {
  int parts;
  DecodingSchedMeta* schedule;
  int* num_splits;
  float *lse, *out;
  int64_t bytes;
};

Workspace workspace_of(const Decode& call, void* memory) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = memory == nullptr ? nullptr : static_cast<char*>(memory) + used;
    used += (bytes + 255) / 256 * 256;
    return at;
  };
  Workspace w{};
  w.parts = std::max(multiprocessors() / call.tokens_per_seq / (call.heads / 64), 1);
  const int64_t rows = int64_t{call.batch + w.parts} * call.tokens_per_seq * call.heads;
  w.schedule = reinterpret_cast<DecodingSchedMeta*>(take(int64_t{w.parts} * DecodingSchedMetaSize));
  w.num_splits = reinterpret_cast<int*>(take(int64_t{4} * (call.batch + 1)));
  w.lse = reinterpret_cast<float*>(take(4 * rows));
  w.out = reinterpret_cast<float*>(take(4 * rows * kDim));
  w.bytes = used;
  return w;
}

Bf16* bf16(const void* data) {
  return static_cast<Bf16*>(const_cast<void*>(data));
}
int* ints(const int32_t* data) {
  return const_cast<int*>(data);
}
float* floats(const float* data) {
  return const_cast<float*>(data);
}

}  // namespace

int64_t workspace_bytes(const Decode& call) {
  return workspace_of(call, nullptr).bytes;
}

void schedule(const Decode& call, void* workspace, cudaStream_t stream) {
  const Workspace w = workspace_of(call, workspace);
  GetDecodeSchedMetaParams params{};
  params.b = call.batch;
  params.s_q = call.tokens_per_seq;
  params.block_size_n = kBlockRows;
  params.fixed_overhead_num_blocks = kFixedBlocks;
  params.topk = call.window.count;
  params.extra_topk = call.compressed.count;
  params.tile_scheduler_metadata_ptr = w.schedule;
  params.num_splits_ptr = w.num_splits;
  params.num_sm_parts = w.parts;
  params.stream = stream;
  smxx::decode::run_get_decoding_sched_meta_kernel(params);
}

void decode(const Decode& call, void* workspace, cudaStream_t stream) {
  const Workspace w = workspace_of(call, workspace);
  const int token_elems = call.heads * kDim, s_q = call.tokens_per_seq;
  SparseAttnDecodeParams params{};
  params.b = call.batch;
  params.s_q = s_q;
  params.h_q = call.heads;
  params.h_kv = 1;
  params.d_qk = params.d_v = kDim;
  params.sm_scale = call.softmax_scale;
  params.sm_scale_div_log2 = call.softmax_scale * kLog2E;
  params.model_type = ModelType::MODEL1;
  params.q = bf16(call.q);
  params.out = bf16(call.out);
  params.lse = call.lse;
  params.attn_sink = floats(call.sink);
  params.num_blocks = call.window.num_pages;
  params.page_block_size = call.window.rows_per_page;
  params.topk = call.window.count;
  params.kv = bf16(call.window.base);
  params.indices = ints(call.window.slots);
  params.extra_num_blocks = call.compressed.num_pages;
  params.extra_page_block_size = call.compressed.rows_per_page;
  params.extra_topk = call.compressed.count;
  params.extra_kv = bf16(call.compressed.base);
  params.extra_indices = ints(call.compressed.slots);
  params.stride_q_b = params.stride_o_b = s_q * token_elems;
  params.stride_q_s_q = params.stride_o_s_q = token_elems;
  params.stride_q_h_q = params.stride_o_h_q = kDim;
  params.stride_kv_block = static_cast<int>(call.window.page_stride_bytes);
  params.stride_kv_row = kRowBytes;
  params.stride_indices_b = s_q * call.window.count;
  params.stride_indices_s_q = call.window.count;
  params.stride_lse_b = s_q * call.heads;
  params.stride_lse_s_q = call.heads;
  params.stride_extra_kv_block = static_cast<int>(call.compressed.page_stride_bytes);
  params.stride_extra_kv_row = call.compressed.base != nullptr ? kRowBytes : 0;
  params.stride_extra_indices_b = s_q * call.compressed.count;
  params.stride_extra_indices_s_q = call.compressed.count;
  params.stream = stream;
  params.lse_accum = w.lse;
  params.o_accum = w.out;
  params.stride_lse_accum_split = s_q * call.heads;
  params.stride_lse_accum_s_q = call.heads;
  params.stride_o_accum_split = s_q * token_elems;
  params.stride_o_accum_s_q = token_elems;
  params.stride_o_accum_h_q = kDim;
  params.tile_scheduler_metadata_ptr = w.schedule;
  params.num_splits_ptr = w.num_splits;
  params.num_sm_parts = w.parts;
  using sm90::decode::sparse_fp8::run_flash_splitkv_mla_fp8_sparse_kernel;
  if (call.heads == 64) {
    run_flash_splitkv_mla_fp8_sparse_kernel<ModelType::MODEL1, 64>(params);
  } else {
    run_flash_splitkv_mla_fp8_sparse_kernel<ModelType::MODEL1, 128>(params);
  }

  CombineParams combine{};
  combine.b = call.batch;
  combine.s_q = s_q;
  combine.h_q = call.heads;
  combine.d_v = kDim;
  combine.lse = params.lse;
  combine.out = params.out;
  combine.stride_lse_b = params.stride_lse_b;
  combine.stride_lse_s_q = params.stride_lse_s_q;
  combine.stride_o_b = params.stride_o_b;
  combine.stride_o_s_q = params.stride_o_s_q;
  combine.stride_o_h_q = params.stride_o_h_q;
  combine.lse_accum = params.lse_accum;
  combine.o_accum = params.o_accum;
  combine.stride_lse_accum_split = params.stride_lse_accum_split;
  combine.stride_lse_accum_s_q = params.stride_lse_accum_s_q;
  combine.stride_o_accum_split = params.stride_o_accum_split;
  combine.stride_o_accum_s_q = params.stride_o_accum_s_q;
  combine.stride_o_accum_h_q = params.stride_o_accum_h_q;
  combine.tile_scheduler_metadata_ptr = params.tile_scheduler_metadata_ptr;
  combine.num_splits_ptr = params.num_splits_ptr;
  combine.num_sm_parts = params.num_sm_parts;
  combine.attn_sink = params.attn_sink;
  combine.stream = stream;
  smxx::decode::run_flash_mla_combine_kernel<Bf16>(combine);
}

void prefill(const Prefill& call, cudaStream_t stream) {
  SparseAttnFwdParams params{};
  params.s_q = call.tokens;
  params.s_kv = call.rows;
  params.h_q = call.heads;
  params.h_kv = 1;
  params.d_qk = params.d_v = kDim;
  params.topk = call.count;
  params.sm_scale = call.softmax_scale;
  params.sm_scale_div_log2 = call.softmax_scale * kLog2E;
  params.q = bf16(call.q);
  params.kv = bf16(call.kv);
  params.indices = ints(call.indices);
  params.attn_sink = floats(call.sink);
  params.stride_q_s_q = call.heads * kDim;
  params.stride_q_h_q = kDim;
  params.stride_kv_s_kv = params.stride_kv_h_kv = kDim;
  params.stride_indices_s_q = params.stride_indices_h_kv = call.count;
  params.out = bf16(call.out);
  params.max_logits = call.max_logits;
  params.lse = call.lse;
  params.num_sm = multiprocessors();
  params.stream = stream;
  sm90::fwd::run_fwd_phase1_kernel<kDim, false>(params);
}

}  // namespace dsv4::flash_mla
