// One instantiation of DeepGEMM's product, and its launch.
#pragma once
#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>

#include "bench/deep_gemm.h"
#include "bench/deep_gemm_launch.cuh"

namespace dsv4::deep_gemm {

constexpr int align_to(int value, int unit) {
  return (value + unit - 1) / unit * unit;
}

/// Tile and cluster as chosen by its heuristics; the stages that then fit follow from them.
template <int kGroups, int kRows, int kCols, int kBlockTokens, int kBlockRows, int kClusterTokens,
          int kClusterRows>
void run_product(const Product& call, cudaStream_t stream) {
  constexpr int kBlockCols = 128, kMaxStages = 16, kSmemBytes = 232448;
  constexpr int kOutSwizzle = kBlockRows % 64 == 0   ? 128
                              : kBlockRows % 32 == 0 ? 64
                                                     : 32;  // bytes; rows are bf16
  constexpr int kExtra = align_to(kBlockTokens * kBlockRows * 2, 1024) + kMaxStages * 16 +
                         align_to(kCols / 128 * 4 * (128 % kBlockRows == 0 ? 1 : 2), 8);
  constexpr int kStageBytes =
      (kBlockTokens + kBlockRows) * kBlockCols + align_to(kBlockTokens * 4, 128);
  constexpr int kFit = (kSmemBytes - kExtra) / kStageBytes;
  constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
  constexpr int kMathThreads = kBlockTokens <= 64 ? 128 : 256;
  constexpr int kCluster = kClusterTokens * kClusterRows;
  constexpr bool kBatched = kGroups > 1;
  constexpr auto kKind = kBatched ? ::deep_gemm::GemmType::Batched : ::deep_gemm::GemmType::Normal;
  const auto kernel = &::deep_gemm::sm90_fp8_gemm_1d2d_impl<
      cute::UMMA::Major::K, 0, kRows, kCols, kGroups, kBlockTokens, kBlockRows, kBlockCols, 128,
      128, kOutSwizzle, kStages, 128, kMathThreads, kCluster, (kClusterRows > 1), kMultiprocessors,
      kKind, cutlass::bfloat16_t, ::deep_gemm::epilogue::transform::EpilogueIdentity>;

  const auto tokens = static_cast<uint64_t>(call.tokens);
  const auto scale_tokens = static_cast<uint64_t>(x_scale_tokens(call.tokens));
  constexpr uint64_t kG = kGroups, kR = kRows, kC = kCols;
  const auto matrix = [&](const void* data, bool bf16, int swizzle, uint64_t cols, uint64_t rows,
                          uint64_t row_bytes, uint64_t group_bytes, uint32_t box_cols,
                          uint32_t box_rows) {
    const auto type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    return kBatched
               ? tensor_map(data, type, swizzle, {cols, rows, kG}, {row_bytes, group_bytes},
                            {box_cols, box_rows, 1})
               : tensor_map(data, type, swizzle, {cols, rows}, {row_bytes}, {box_cols, box_rows});
  };
  const CUtensorMap x =
      matrix(call.x, false, 128, kC, tokens, kG * kC, kC, kBlockCols, kBlockTokens);
  const CUtensorMap w = matrix(call.w, false, 128, kC, kR, kC, kR * kC, kBlockCols, kBlockRows);
  const CUtensorMap out = matrix(call.out, true, kOutSwizzle, kR, tokens, kG * kR * 2, kR * 2,
                                 kOutSwizzle / 2, kBlockTokens);
  const CUtensorMap x_scale =
      tensor_map(call.x_scale, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 0, {scale_tokens, kC / 128 * kG},
                 {scale_tokens * 4}, {kBlockTokens, 1});
  launch(kernel, kMultiprocessors, 128 + kMathThreads, kExtra + kStages * kStageBytes, kCluster,
         stream, const_cast<float*>(call.w_scale), static_cast<int*>(nullptr),
         static_cast<uint32_t>(call.tokens), static_cast<uint32_t>(kRows),
         static_cast<uint32_t>(kCols), x, w, out, x_scale);
}

}  // namespace dsv4::deep_gemm
