// linear, few rows of x: the weights are read once, converted in registers, never stored.
//
// Problem   y[m][n] = sum_k x[m][k] W[n][k] for up to 8 rows of x (f32: 4; FP8 of few columns: 16)
// Tiling    4 rows of W x M <= 4 rows of x; more rows of x in passes of 4, of which all but the
//           first find W in L2 (8 x 2 accumulators and one pass read x from L2). With 4 rows of x
//           and FP8, the rows of a step lie in one block of scales. The rows of W come from distant
//           stripes of the tile, row i of each: every stream that the prefetcher sees is then long
//           and contiguous. Adjacent rows of K = 1024 defeat it and run three times slower on one
//           thread.
//           Blocks of K outermost would keep x in L1, but cut those streams short: 15-20% slower.
// Budget    two threads that share memory leave about 14 cycles per 64 bytes; FP8, M = 1 takes 5.4
//           with BF16 instructions, and about 10 (20 instructions, two ports) without
// Contract  any N (the last stripes repeat the tile's last row), any K (the last partial group of
//           128 columns is copied and zero-padded), sums in the order of linear.h
#pragma once
#include <numeric>

#include "backends/cpu/ops/linear_avx512-inl.h"

namespace dsv4::cpu {
namespace {

// Bytes of 128 columns of the widest weight, f32.
constexpr int kMaxGroupBytes = kLinearGroup * 4;
constexpr int64_t kPrefetchBytes = 2048;
// Rows of x of a pass over W, and the bytes of W that a second pass finds in L2.
constexpr int kPassRows = 4;
constexpr int64_t kPassBytes = 256 << 10;
// Rows of W of a step.
constexpr int kRows = 4;

// ---- one kind of weight each: `add` adds 128 columns of kRows rows. From kPrefetchRows rows of x
// on, a step takes long enough for the hardware prefetcher to fall behind.

/// What a kind sees of kRows rows and M rows of x: `x` points to the group's columns of those M.
template <int M, int kXBytes>
struct Group {
  const std::byte* w[kRows];
  const uint8_t* scale[kRows];
  const std::byte* x;
  /// Vector `part`, of 64 bytes; pairs of W have kPairVectors of x.
  const std::byte* x_part(int m, int part) const {
    return x + m * kLinearGroup * kXBytes + 64 * part;
  }
  const std::byte* x_pairs(int m, int part) const { return x_part(m, part * kPairVectors); }
};

template <int M>
using Accumulators = __m512[kRows][M];

struct Fp8Kind {
  /// From so many rows of x on, the rows of W of a step have one scale: its table is loaded once.
  static constexpr int kSharedScale = 4;
  static constexpr int kPrefetchRows = 1;
  static constexpr int kBitsPerColumn = 8;
  static constexpr int kXBytes = 2 * kPairVectors;
  const Fp8Tables* tables = &fp8_tables();

  template <int M>
  DSV4_INLINE void add(const Group<M, kXBytes>& group, Accumulators<M>& acc) const {
    if constexpr (M >= kSharedScale) {
      const Fp8Table table = load_table(*tables, *group.scale[0]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i pairs[2][kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          fp8_to_bf16(_mm512_loadu_si512(group.w[r] + 64 * half), table, pairs[0][r], pairs[1][r]);
        }
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const std::byte* x = group.x_pairs(m, 2 * half + part);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) acc[r][m] = dot_pairs(acc[r][m], pairs[part][r], x);
          }
        }
      }
      return;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Fp8Table table = load_table(*tables, *group.scale[r]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i first, second;
        fp8_to_bf16(_mm512_loadu_si512(group.w[r] + 64 * half), table, first, second);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          acc[r][m] = dot_pairs(acc[r][m], first, group.x_pairs(m, 2 * half));
          acc[r][m] = dot_pairs(acc[r][m], second, group.x_pairs(m, 2 * half + 1));
        }
      }
    }
  }
};

struct Fp4Kind {
  static constexpr int kPrefetchRows = 1;
  static constexpr int kBitsPerColumn = 4;
  static constexpr int kXBytes = 2 * kPairVectors;
  __m512i table = fp4_table();

  template <int M>
  DSV4_INLINE void add(const Group<M, kXBytes>& group, Accumulators<M>& acc) const {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __m512i values[4];
      fp4_to_bf16(_mm512_loadu_si512(group.w[r]), table, values);
      const __m512 scales = fp4_lane_scales(group.scale[r]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
          sum = dot_pairs(sum, values[part], group.x_pairs(m, part));
        }
        acc[r][m] = _mm512_fmadd_ps(sum, scales, acc[r][m]);
      }
    }
  }
};

struct Bf16Kind {
  static constexpr int kPrefetchRows = 3;
  static constexpr int kBitsPerColumn = 16;
  static constexpr int kXBytes = 2 * kPairVectors;

  template <int M>
  DSV4_INLINE void add(const Group<M, kXBytes>& group, Accumulators<M>& acc) const {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const __m512i values = _mm512_loadu_si512(group.w[r] + 64 * part);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          acc[r][m] = dot_pairs(acc[r][m], values, group.x_pairs(m, part));
        }
      }
    }
  }
};

// f32 products: x in f32, W in f32 or bf16.
template <bool kWeightIsBf16>
struct F32Kind {
  static constexpr int kPrefetchRows = 3;
  static constexpr int kBitsPerColumn = kWeightIsBf16 ? 16 : 32;
  static constexpr int kXBytes = 4;

  template <int M>
  DSV4_INLINE void add(const Group<M, kXBytes>& group, Accumulators<M>& acc) const {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int part = 0; part < 8; ++part) {
        __m512 values;
        if constexpr (kWeightIsBf16) {
          const auto* from = reinterpret_cast<const __m256i*>(group.w[r] + 32 * part);
          values = _mm512_castsi512_ps(
              _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from)), 16));
        } else {
          values = _mm512_loadu_ps(group.w[r] + 64 * part);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          acc[r][m] = _mm512_fmadd_ps(values, _mm512_loadu_ps(group.x_part(m, part)), acc[r][m]);
        }
      }
    }
  }
};

// ---- the loop over rows, blocks and groups

/// Scale bytes of a row of W; null where it has none.
const uint8_t* scale_row(const Weight& w, int64_t row) {
  if (w.dtype == DType::kF4E2M1) return w.scale + row * w.scale_stride;
  return w.dtype == DType::kF8E4M3 ? w.scale + row / w.block_rows * w.scale_stride : nullptr;
}

/// log2 of the columns of a scale byte; without scales, every column's index is 0.
int scale_shift(const Weight& w) {
  if (w.dtype == DType::kF4E2M1) return 5;
  return w.dtype == DType::kF8E4M3 ? std::countr_zero(static_cast<uint32_t>(w.block_cols)) : 63;
}

template <typename Kind, int M>
__attribute__((noinline)) void stream(const LinearTile& tile) {
  constexpr int64_t kGroupBytes = kLinearGroup * Kind::kBitsPerColumn / 8;
  const PreparedX& x = *tile.x;
  const Weight& w = *tile.w;
  const Kind kind;
  const int64_t row_bytes = w.row_stride * Kind::kBitsPerColumn / 8;
  const int64_t full_cols = w.cols / kLinearGroup * kLinearGroup;
  const int64_t tail_cols = w.cols - full_cols;
  const int64_t stripe = ceil_div(tile.n_end - tile.n_begin, kRows);
  const int shift = scale_shift(w);
  const std::byte* x_columns = x.data + tile.m_begin * (kLinearGroup * Kind::kXBytes);
  const int64_t x_column_bytes = x.padded_rows * Kind::kXBytes;

  for (int64_t i = 0; i < stripe; ++i) {
    int64_t rows[kRows];
    const std::byte* from[kRows];
    const uint8_t* scales[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      rows[r] = std::min(tile.n_begin + r * stripe + i, tile.n_end - 1);
      from[r] = static_cast<const std::byte*>(w.data) + rows[r] * row_bytes;
      scales[r] = scale_row(w, rows[r]);
    }
    __m128 total[M];
    for (int64_t k0 = 0; k0 < x.padded_cols; k0 += kLinearBlock) {
      const int64_t block = std::min<int64_t>(kLinearBlock, x.padded_cols - k0);
      Group<M, Kind::kXBytes> group;
      Accumulators<M> acc;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
      }
      const int64_t full_end = std::min(k0 + block, full_cols);
      for (int64_t k = k0; k < full_end; k += kLinearGroup) {
        group.x = x_columns + k * x_column_bytes;
        const int64_t scale_idx = k >> shift;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          group.w[r] = from[r] + k * Kind::kBitsPerColumn / 8;
          group.scale[r] = scales[r] + scale_idx;
          if constexpr (M >= Kind::kPrefetchRows) {
            for (int64_t line = 0; line < kGroupBytes; line += 64)
              _mm_prefetch(group.w[r] + line + kPrefetchBytes, _MM_HINT_T0);
          }
        }
        kind.add(group, acc);
      }
      if (full_end < k0 + block && tail_cols > 0) {
        alignas(64) std::byte tail[kRows][kMaxGroupBytes];
        uint8_t tail_scales[kRows][4];
        std::memset(tail, 0, sizeof(tail));
        std::memset(tail_scales, 127, sizeof(tail_scales));
        group.x = x_columns + full_cols * x_column_bytes;
        for (int r = 0; r < kRows; ++r) {
          std::memcpy(tail[r], from[r] + full_cols * Kind::kBitsPerColumn / 8,
                      static_cast<size_t>(tail_cols * Kind::kBitsPerColumn / 8));
          if (w.scale != nullptr) {
            const int64_t count = Kind::kBitsPerColumn == 4 ? ceil_div(tail_cols, 32) : 1;
            std::memcpy(tail_scales[r], scales[r] + (full_cols >> shift),
                        static_cast<size_t>(count));
          }
          group.w[r] = tail[r];
          group.scale[r] = tail_scales[r];
        }
        kind.add(group, acc);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m128 sum = tree4(acc[0][m], acc[1][m], acc[2][m], acc[3][m]);
        total[m] = k0 == 0 ? sum : _mm_add_ps(total[m], sum);
      }
    }
    for (int m = 0; m < M; ++m) {
      alignas(16) float values[4];
      _mm_store_ps(values, total[m]);
      for (int r = 0; r < kRows; ++r)
        store_row(tile.out, tile.m_begin + m, rows[r], _mm_set_ss(values[r]), 1);
    }
  }
}

/// Whether the rows of W of a step must have one scale.
template <typename Kind>
constexpr bool shares_scale(int64_t rows) {
  if constexpr (requires { Kind::kSharedScale; }) return rows >= Kind::kSharedScale;
  return false;
}

template <typename Kind>
void stream_rows(const LinearTile& tile) {
  using Kernel = void (*)(const LinearTile&);
  static constexpr Kernel kKernels[kPassRows] = {stream<Kind, 1>, stream<Kind, 2>, stream<Kind, 3>,
                                                 stream<Kind, 4>};
  constexpr int64_t kMinRows = 4 * kRows;
  const int64_t rows = tile.m_end - tile.m_begin;
  const bool shared_scale = shares_scale<Kind>(rows);
  if (rows <= kPassRows && !shared_scale) return kKernels[rows - 1](tile);
  const int64_t row_bytes = tile.w->row_stride * Kind::kBitsPerColumn / 8;
  int64_t step = std::bit_floor(static_cast<uint64_t>(std::max(kPassBytes / row_bytes, kMinRows)));
  if (shared_scale) step = std::gcd(step, int64_t{tile.w->block_rows});
  LinearTile pass = tile;
  for (int64_t n = tile.n_begin; n < tile.n_end; n = pass.n_end) {
    pass.n_begin = n;
    pass.n_end = std::min(tile.n_end, (n / step + 1) * step);
    for (int64_t m = tile.m_begin; m < tile.m_end; m += kPassRows) {
      pass.m_begin = m;
      pass.m_end = std::min(tile.m_end, m + kPassRows);
      kKernels[pass.m_end - m - 1](pass);
    }
  }
}

void compute_streamed(const LinearTile& tile) {
  switch (tile.x->lanes) {
    case Lanes::kFp8:
      return stream_rows<Fp8Kind>(tile);
    case Lanes::kFp4:
      return stream_rows<Fp4Kind>(tile);
    case Lanes::kBf16:
      return stream_rows<Bf16Kind>(tile);
    case Lanes::kF32:
      if (tile.w->dtype == DType::kBf16) return stream_rows<F32Kind<true>>(tile);
      return stream_rows<F32Kind<false>>(tile);
  }
}

}  // namespace
}  // namespace dsv4::cpu
