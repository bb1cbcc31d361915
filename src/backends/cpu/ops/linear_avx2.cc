// The AVX2 candidate of `linear` (FMA and F16C: Haswell, Zen and later), with the bits of all
// others.
//
// Both operands are widened to f32 in the sequence of linear.h; the 16 lanes are two ymm, and every
// kind of weight is then the same chain of fused multiply-adds:
//   panel     48 rows of W x 1024 columns, expanded to tiles [step][3 rows][16 lanes]
//   register  4 rows of x x 3 of W, first lanes 0-7 over the whole block, then lanes 8-15:
//             12 accumulators, 7 loads and 12 FMA a step
// Up to 4 rows of x, W is widened in registers and never stored.
#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "backends/cpu/ops/linear.h"
#include "backends/cpu/ops/linear_avx2_weight-inl.h"
#include "core/numbers.h"

namespace dsv4::cpu {
namespace {

constexpr int kTileColumns = 3;  // rows of W in a register tile
constexpr int64_t kMaxRowsOfX = 256;
constexpr int64_t kPanelRows = 48;  // 192 KiB expanded: fits the L2 cache of most
constexpr int64_t kFewRows = 4;     // up to here x is not tiled
constexpr int kGroupsOfBlock = kLinearBlock / kLinearGroup;
constexpr int64_t kStep = kTileColumns * kLinearLanes;  // floats of a step of a panel tile

constexpr int64_t kPanelBytes = kPanelRows * kLinearBlock * 4;
constexpr int64_t kSumBytes = kMaxRowsOfX * kPanelRows * 4;
constexpr int64_t kScaleBytes = kPanelRows * kGroupsOfBlock * kLinearLanes * 4;

// ---- x

// Nearest E4M3 value (saturating) of v / 2^exponent, times 2^exponent.
DSV4_INLINE __m256 quantise8(__m256 v, __m256 inverse_scale, __m256 scale) {
  const __m256 sign_bit = _mm256_set1_ps(-0.0f);
  const __m256 value = _mm256_mul_ps(v, inverse_scale);
  const __m256 sign = _mm256_and_ps(value, sign_bit);
  const __m256 magnitude =
      _mm256_min_ps(_mm256_andnot_ps(sign_bit, value), _mm256_set1_ps(kE4m3Max));
  // Normal codes keep 3 mantissa bits; subnormal ones are multiples of 2^-9, where adding
  // 1.5 * 2^14 rounds.
  const __m256i bits = _mm256_castps_si256(magnitude);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_and_si256(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff)), odd),
                       _mm256_set1_epi32(static_cast<int>(0xfff00000u)));
  const __m256 magic = _mm256_set1_ps(24576.0f);
  const __m256 subnormal = _mm256_sub_ps(_mm256_add_ps(magnitude, magic), magic);
  const __m256 small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ);
  const __m256 code = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), subnormal, small);
  return _mm256_or_ps(_mm256_mul_ps(code, scale), sign);
}

void quantise(float* values, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < kLinearGroup; i += 8) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  uint32_t amax_bits = 0;
  for (const uint32_t lane : lanes) amax_bits = std::max(amax_bits, lane);
  if (amax_bits >= 0x7f800000u) {  // infinity or NaN: the group has no scale
    for (int64_t i = 0; i < count; ++i) values[i] = bf16_to_f32(0x7fc0);
    return;
  }
  const float amax = std::max(std::bit_cast<float>(amax_bits), 1e-4f);
  const int exponent = ceil_log2_ratio(amax, kE4m3Max);
  const __m256 scale = _mm256_set1_ps(exp2_int(exponent));
  const __m256 inverse_scale = _mm256_set1_ps(exp2_int(-exponent));
  for (int i = 0; i < kLinearGroup; i += 8)
    _mm256_store_ps(values + i, quantise8(_mm256_load_ps(values + i), inverse_scale, scale));
}

void prepare_row(const PreparedX& x, int64_t m) {
  const auto& columns = kColumns[static_cast<size_t>(x.lanes)];
  const int64_t tile = m / x.tile_rows * x.tile_rows;
  for (int64_t k = 0; k < x.padded_cols; k += kLinearGroup) {
    alignas(32) float values[kLinearGroup] = {};
    if (m < x.rows) {
      const int64_t count = std::min<int64_t>(kLinearGroup, x.x.shape[1] - k);
      const int64_t element = (x.row_begin + m) * x.x.strides[0] + k;
      if (x.x.dtype == DType::kF32) {
        std::memcpy(values, static_cast<const float*>(x.x.data) + element,
                    static_cast<size_t>(count) * sizeof(float));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(x.x.data) + element;
        for (int64_t i = 0; i < count; ++i) values[i] = bf16_to_f32(from[i]);
      }
      if (x.quantise) quantise(values, count);
    }
    const int64_t k0 = k / kLinearBlock * kLinearBlock;
    float* to = reinterpret_cast<float*>(x.data) + linear_tile_offset(x, tile, k0) +
                (k - k0) * x.tile_rows + (m - tile) * kLinearLanes;
    for (int p = 0; p < kLinearGroup; ++p)
      to[p / kLinearLanes * kLinearLanes * x.tile_rows + p % kLinearLanes] = values[columns[p]];
  }
}

void prepare(const PreparedX& x, int64_t m_begin, int64_t m_end) {
  if (m_end == x.rows) m_end = x.padded_rows;
  for (int64_t m = m_begin; m < m_end; ++m) prepare_row(x, m);
}

// ---- register tiles

// Tree over lanes 0-7 of an accumulator whose lanes l and l + 8 were added.
DSV4_INLINE float tree8(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// kRows rows of x (interleaved) times one tile of a panel. scales: [group][3][16] for FP4.
template <int kRows, bool kFp4>
__attribute__((noinline)) void multiply(const float* x, const float* w, const float* scales,
                                        int64_t block, float (&sums)[kRows][kTileColumns]) {
  __m256 halves[2][kRows][kTileColumns];
  for (int half = 0; half < 2; ++half) {
    const float* x_at = x + 8 * half;
    const float* w_at = w + 8 * half;
    const float* scale_at = scales + 8 * half;
    auto& total = halves[half];
    __m256 acc[kRows][kTileColumns];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
      for (int n = 0; n < kTileColumns; ++n) {
        acc[m][n] = _mm256_setzero_ps();
        if constexpr (kFp4) total[m][n] = _mm256_setzero_ps();
      }
    }
    const int64_t run = kFp4 ? kLinearGroup : block;
    for (int64_t k = 0; k < block; k += run) {
      for (int64_t step = 0; step < run; step += kLinearLanes) {
        __m256 columns[kTileColumns];
#pragma GCC unroll 3
        for (int n = 0; n < kTileColumns; ++n)
          columns[n] = _mm256_loadu_ps(w_at + kLinearLanes * n);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const __m256 row = _mm256_loadu_ps(x_at + kLinearLanes * m);
#pragma GCC unroll 3
          for (int n = 0; n < kTileColumns; ++n)
            acc[m][n] = _mm256_fmadd_ps(columns[n], row, acc[m][n]);
        }
        x_at += kRows * kLinearLanes;
        w_at += kStep;
      }
      if constexpr (kFp4) {
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
          for (int n = 0; n < kTileColumns; ++n) {
            total[m][n] = _mm256_fmadd_ps(acc[m][n], _mm256_loadu_ps(scale_at + kLinearLanes * n),
                                          total[m][n]);
            acc[m][n] = _mm256_setzero_ps();
          }
        }
        scale_at += kStep;
      }
    }
    if constexpr (!kFp4) {
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
        for (int n = 0; n < kTileColumns; ++n) total[m][n] = acc[m][n];
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kTileColumns; ++n)
      sums[m][n] = tree8(_mm256_add_ps(halves[0][m][n], halves[1][m][n]));
  }
}

// ---- one tile of outputs

struct Panel {
  int64_t n, n_end;
  int64_t k0, block;
};

struct TileScratch {
  float* panel;
  float* sums;  // [rows of x][kPanelRows]
  float* scales;
  explicit TileScratch(std::byte* base)
      : panel(reinterpret_cast<float*>(base)),
        sums(reinterpret_cast<float*>(base + kPanelBytes)),
        scales(reinterpret_cast<float*>(base + kPanelBytes + kSumBytes)) {}
};

// Rows past the end repeat the last one: their outputs are not stored.
template <typename Kind>
void expand(const LinearTile& tile, const Panel& panel, const TileScratch& scratch) {
  constexpr bool kFp4 = std::is_same_v<Kind, Fp4Pairs>;
  float* to = scratch.panel;
  float* scales = scratch.scales;
  for (int64_t n = panel.n; n < panel.n_end; n += kTileColumns) {
    WeightRow rows[kTileColumns];
    for (int r = 0; r < kTileColumns; ++r)
      rows[r] = WeightRow(*tile.w, std::min(n + r, panel.n_end - 1));
    for (int64_t k = panel.k0; k < panel.k0 + panel.block; k += kLinearGroup, to += 8 * kStep) {
      for (int r = 0; r < kTileColumns; ++r) {
        Kind::expand(rows[r], k, [&](int step, __m256 low, __m256 high) {
          float* at = to + step * kStep + r * kLinearLanes;
          _mm256_storeu_ps(at, low);
          _mm256_storeu_ps(at + 8, high);
        });
        if constexpr (kFp4) {
          __m256 low, high;
          fp4_lane_scales(rows[r], k, low, high);
          _mm256_storeu_ps(scales + r * kLinearLanes, low);
          _mm256_storeu_ps(scales + r * kLinearLanes + 8, high);
        }
      }
      if constexpr (kFp4) scales += kStep;
    }
  }
}

template <int kRows, bool kFp4>
void multiply_panel(const LinearTile& tile, const Panel& panel, const TileScratch& scratch) {
  const PreparedX& x = *tile.x;
  for (int64_t m = tile.m_begin; m < tile.m_end; m += kRows) {
    const float* rows = reinterpret_cast<const float*>(x.data) + linear_tile_offset(x, m, panel.k0);
    for (int64_t n = 0; n < panel.n_end - panel.n; n += kTileColumns) {
      float sums[kRows][kTileColumns];
      multiply<kRows, kFp4>(rows, scratch.panel + n * panel.block,
                            scratch.scales + n / kTileColumns * panel.block / kLinearGroup * kStep,
                            panel.block, sums);
      for (int i = 0; i < kRows; ++i) {
        float* to = scratch.sums + (m - tile.m_begin + i) * kPanelRows + n;
        for (int j = 0; j < kTileColumns; ++j)
          to[j] = panel.k0 == 0 ? sums[i][j] : to[j] + sums[i][j];
      }
    }
  }
}

void store_one(const Tensor& out, int64_t row, int64_t col, float value) {
  const int64_t element = row * out.strides[0] + col;
  if (out.dtype == DType::kF32) {
    static_cast<float*>(out.data)[element] = value;
  } else {
    static_cast<uint16_t*>(out.data)[element] = f32_to_bf16(value);
  }
}

void store(const LinearTile& tile, const Panel& panel, const float* sums) {
  const Tensor& out = tile.out;
  for (int64_t m = tile.m_begin; m < tile.m_end; ++m, sums += kPanelRows) {
    const int64_t element = m * out.strides[0] + panel.n;
    const int64_t count = panel.n_end - panel.n;
    if (out.dtype == DType::kF32) {
      std::memcpy(static_cast<float*>(out.data) + element, sums,
                  static_cast<size_t>(count) * sizeof(float));
    } else {
      uint16_t* to = static_cast<uint16_t*>(out.data) + element;
      for (int64_t i = 0; i < count; ++i) to[i] = f32_to_bf16(sums[i]);
    }
  }
}

template <typename Kind>
void compute_tiled(const LinearTile& tile) {
  const PreparedX& x = *tile.x;
  const TileScratch scratch(tile.scratch);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += kPanelRows) {
    Panel panel{n, std::min(tile.n_end, n + kPanelRows), 0, 0};
    for (; panel.k0 < x.padded_cols; panel.k0 += kLinearBlock) {
      panel.block = std::min<int64_t>(kLinearBlock, x.padded_cols - panel.k0);
      expand<Kind>(tile, panel, scratch);
      multiply_panel<kLinearTileRows, std::is_same_v<Kind, Fp4Pairs>>(tile, panel, scratch);
    }
    store(tile, panel, scratch.sums);
  }
}

// ---- few rows of x: W is widened in registers and never stored. Two rows of W at a time, from two
// stripes of the tile, so that each stream of memory is long (one from 3 rows of x on: registers).

// `ordinary` looks at a whole block before it is multiplied, and waits for memory unless it was
// fetched beside the block before. Rows follow each other: this reaches into the next one.
constexpr int kPrefetchBytes = 2048;

// Sums of one block of K. With kOrdinary nothing in the loop calls a function, so that the
// accumulators stay in registers.
template <typename Kind, int kStreams, int M, bool kOrdinary>
DSV4_INLINE void stream_block(const WeightRow (&rows)[kStreams], int64_t k0, int64_t block,
                              const float* x_block, float (&sums)[kStreams][M]) {
  constexpr bool kFp4 = std::is_same_v<Kind, Fp4Pairs>;
  __m256 total[kStreams][M][2];
#pragma GCC unroll 2
  for (int r = 0; r < kStreams; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[r][m][0] = total[r][m][1] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < block; k += kLinearGroup) {
    const auto add_to = [&](__m256(&acc)[M][2]) {
      return [&](int step, __m256 low, __m256 high) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const float* at = x_block + m * block + k + step * kLinearLanes;
          acc[m][0] = _mm256_fmadd_ps(low, _mm256_loadu_ps(at), acc[m][0]);
          acc[m][1] = _mm256_fmadd_ps(high, _mm256_loadu_ps(at + 8), acc[m][1]);
        }
      };
    };
    if constexpr (kOrdinary) {
#pragma GCC unroll 2
      for (int r = 0; r < kStreams; ++r) {
        const auto* ahead = reinterpret_cast<const char*>(rows[r].data + k0 + k) + kPrefetchBytes;
        _mm_prefetch(ahead, _MM_HINT_T0);
        _mm_prefetch(ahead + 64, _MM_HINT_T0);
      }
      // In turns: a row's sums are two chains, whose waiting steps would fill the scheduler.
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
#pragma GCC unroll 2
        for (int r = 0; r < kStreams; ++r)
          Kind::expand_ordinary(rows[r], k0 + k, quarter, add_to(total[r]));
      }
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < kStreams; ++r) {
        if constexpr (!kFp4) {
          Kind::expand(rows[r], k0 + k, add_to(total[r]));
          continue;
        }
        __m256 acc[M][2];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
        Kind::expand(rows[r], k0 + k, add_to(acc));
        __m256 low, high;
        fp4_lane_scales(rows[r], k0 + k, low, high);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          total[r][m][0] = _mm256_fmadd_ps(acc[m][0], low, total[r][m][0]);
          total[r][m][1] = _mm256_fmadd_ps(acc[m][1], high, total[r][m][1]);
        }
      }
    }
  }
  for (int r = 0; r < kStreams; ++r) {
    for (int m = 0; m < M; ++m) sums[r][m] = tree8(_mm256_add_ps(total[r][m][0], total[r][m][1]));
  }
}

template <typename Kind, int M>
__attribute__((noinline)) void stream(const LinearTile& tile) {
  constexpr int kStreams = M <= 2 ? 2 : 1;
  const PreparedX& x = *tile.x;
  const int64_t stripe = ceil_div(tile.n_end - tile.n_begin, kStreams);
  for (int64_t i = 0; i < stripe; ++i) {
    int64_t n[kStreams];
    WeightRow rows[kStreams];
    for (int r = 0; r < kStreams; ++r) {
      n[r] = std::min(tile.n_begin + r * stripe + i, tile.n_end - 1);
      rows[r] = WeightRow(*tile.w, n[r]);
    }
    float y[kStreams][M] = {};
    for (int64_t k0 = 0; k0 < x.padded_cols; k0 += kLinearBlock) {
      const int64_t block = std::min<int64_t>(kLinearBlock, x.padded_cols - k0);
      const float* x_block = reinterpret_cast<const float*>(x.data) + k0 * x.padded_rows;
      float sums[kStreams][M];
      bool ordinary = false;
      if constexpr (requires { &Kind::ordinary; }) {
        ordinary = true;
        for (const WeightRow& row : rows) ordinary = ordinary && Kind::ordinary(row, k0, block);
        if (ordinary) stream_block<Kind, kStreams, M, true>(rows, k0, block, x_block, sums);
      }
      if (!ordinary) stream_block<Kind, kStreams, M, false>(rows, k0, block, x_block, sums);
      for (int r = 0; r < kStreams; ++r) {
        for (int m = 0; m < M; ++m) {
          y[r][m] = k0 == 0 ? sums[r][m] : y[r][m] + sums[r][m];
        }
      }
    }
    for (int r = 0; r < kStreams; ++r) {
      for (int m = 0; m < M; ++m) store_one(tile.out, tile.m_begin + m, n[r], y[r][m]);
    }
  }
}

void compute(const LinearTile& tile) {
  with_kind(tile.w->dtype, tile.x->lanes, [&]<typename Kind>() {
    if (tile.x->tile_rows != 1) return compute_tiled<Kind>(tile);
    static_assert(kFewRows == 4);
    switch (tile.x->rows) {
      case 1:
        return stream<Kind, 1>(tile);
      case 2:
        return stream<Kind, 2>(tile);
      case 3:
        return stream<Kind, 3>(tile);
      default:
        return stream<Kind, 4>(tile);
    }
  });
}

int tile_rows(const Weight&, Lanes, int64_t rows) {
  return rows <= kFewRows ? 1 : kLinearTileRows;
}

LinearBlocking blocking(const PreparedX& x, const Weight&, int64_t total_rows, int num_threads) {
  const int64_t m_block = round_up(ceil_div(x.rows, ceil_div(x.rows, kMaxRowsOfX)), x.tile_rows);
  if (x.tile_rows != 1) return {m_block, kPanelRows};
  // Long runs of W for the prefetcher, and some chunks per thread for balance.
  const int64_t rows = round_up(ceil_div(total_rows, int64_t{8} * num_threads), int64_t{16});
  return {m_block, std::clamp<int64_t>(rows, kPanelRows, 4 * kPanelRows)};
}

}  // namespace

const LinearKernels kLinearAvx2{
    .tile_rows = tile_rows,
    .blocking = blocking,
    .element_bytes_bf16 = sizeof(float),
    .scratch_bytes = kPanelBytes + kSumBytes + kScaleBytes,
    .prepare = prepare,
    .compute = compute,
};

}  // namespace dsv4::cpu

#endif  // __x86_64__
