// FlashMLA's sparse attention kernels for sm_90 without torch: its parameter structs, filled the
// way its own interface fills them. flash_mla.cu is compiled with the headers of a checkout
// (DSV4_FLASH_MLA_SOURCE); nothing of it is part of this tree. For cuda_pair_bench alone.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsv4::flash_mla {

/// Packed pages (fp8_ds_mla, MODEL1 there) and the rows of them that tokens see.
struct ListedPages {
  const void* base = nullptr;  ///< null: none
  int num_pages = 0;
  int rows_per_page = 0;
  int64_t page_stride_bytes = 0;
  const int32_t* slots = nullptr;  ///< [batch, tokens_per_seq, count]
  int count = 0;                   ///< a multiple of 64
};

struct Decode {
  int batch, tokens_per_seq;
  int heads;  ///< 64 or 128
  float softmax_scale;
  const void* q;  ///< [batch, tokens_per_seq, heads, 512] bf16
  void* out;      ///< as q
  float* lse;     ///< [batch, tokens_per_seq, heads] natural log, sink excluded
  const float* sink;
  ListedPages window, compressed;
};

/// Bytes of the schedule, and of what splits of a request hand to the kernel that merges them.
int64_t workspace_bytes(const Decode& call);
/// Deals requests to multiprocessors; once per step there, so not a part of decode().
void schedule(const Decode& call, void* workspace, cudaStream_t stream);
/// Split kernel and combine kernel.
void decode(const Decode& call, void* workspace, cudaStream_t stream);

struct Prefill {
  int tokens;
  int heads;  ///< a multiple of 64
  float softmax_scale;
  const void* q;   ///< [tokens, heads, 512] bf16
  const void* kv;  ///< [rows, 512] bf16
  int rows;
  const int32_t* indices;  ///< [tokens, count]
  int count;               ///< a multiple of 128
  const float* sink;
  void* out;                ///< as q
  float *max_logits, *lse;  ///< [tokens, heads]
};
void prefill(const Prefill& call, cudaStream_t stream);

}  // namespace dsv4::flash_mla
