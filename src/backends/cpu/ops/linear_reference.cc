// The definition of `linear`, scalar: read it beside the equations of linear.h. Every other
// candidate must give the same bits.
#include <array>
#include <cmath>

#include "backends/cpu/ops/linear.h"
#include "core/numbers.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kRowsOfX = 64;  // a tile's rows of x: one expanded block of W serves them all
constexpr int64_t kRowsOfW = 16;

using Block = std::array<float, kLinearBlock>;
// FP4 scale of each lane, for the groups of 128 columns of a block.
using LaneScales = std::array<std::array<float, kLinearLanes>, kLinearBlock / kLinearGroup>;

// Where the floating-point mode cannot flush (FlushDenormals), operands at least do.
float flush(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

float scale_value(uint8_t byte) {
  return flush(e8m0_to_f32(byte));
}

// Code times power of two; exact unless it leaves f32's normal range.
float scaled(float code, uint8_t scale) {
  const double factor = scale == 255 ? std::nan("") : std::ldexp(1.0, scale - 127);
  const double value = static_cast<double>(code) * factor;
  if (std::fabs(value) < 0x1p-126) return std::copysign(0.0f, code);
  return static_cast<float>(value);
}

uint8_t fp4_code(const Weight& w, int64_t row, int64_t col) {
  const auto* bytes = static_cast<const uint8_t*>(w.data);
  const uint8_t pair = bytes[(row * w.row_stride + col) / 2];
  return col % 2 == 0 ? pair & 15 : pair >> 4;
}

// W[row][col] as `lanes` multiplies it: FP4 without its scale, which Lanes::kFp4 applies later.
float weight_value(const Weight& w, Lanes lanes, int64_t row, int64_t col) {
  if (col >= w.cols) return 0.0f;
  const int64_t element = row * w.row_stride + col;
  switch (w.dtype) {
    case DType::kF8E4M3:
      return scaled(e4m3_to_f32(static_cast<const uint8_t*>(w.data)[element]),
                    w.scale[row / w.block_rows * w.scale_stride + col / w.block_cols]);
    case DType::kF4E2M1: {
      const float value = e2m1_to_f32(fp4_code(w, row, col));
      if (lanes == Lanes::kFp4) return value;
      return scaled(value, w.scale[row * w.scale_stride + col / kFp4ScaleGroup]);
    }
    case DType::kBf16:
      return flush(bf16_to_f32(static_cast<const uint16_t*>(w.data)[element]));
    default:
      return flush(static_cast<const float*>(w.data)[element]);
  }
}

// x[row][128 group .. + 128): as stored, or the nearest E4M3 value times a power of two.
// Source: spec/numerics.md 3, 4. A group with an infinity or NaN has no scale: all NaN.
std::array<float, kLinearGroup> input_group(const PreparedX& x, int64_t row, int64_t group) {
  std::array<float, kLinearGroup> values{};
  const int64_t first = group * kLinearGroup;
  const int64_t count = std::min<int64_t>(kLinearGroup, x.x.shape[1] - first);
  const int64_t element = (x.row_begin + row) * x.x.strides[0] + first;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = flush(x.x.dtype == DType::kF32
                          ? static_cast<const float*>(x.x.data)[element + i]
                          : bf16_to_f32(static_cast<const uint16_t*>(x.x.data)[element + i]));
  }
  if (!x.quantise) return values;
  float amax = 1e-4f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(values[i]);
    amax = std::max(amax, std::fabs(values[i]));
  }
  if (!finite) {
    std::fill_n(values.begin(), count, std::nanf(""));
    return values;
  }
  const int exponent = ceil_log2_ratio(amax, kE4m3Max);
  for (int64_t i = 0; i < count; ++i) {
    const float code = e4m3_to_f32(f32_to_e4m3(flush(std::ldexp(values[i], -exponent))));
    values[i] = static_cast<float>(std::ldexp(static_cast<double>(code), exponent));
  }
  return values;
}

void prepare(const PreparedX& x, int64_t m_begin, int64_t m_end) {
  for (int64_t m = m_begin; m < m_end; ++m) {
    for (int64_t group = 0; group < x.padded_cols / kLinearGroup; ++group) {
      const auto values = input_group(x, m, group);
      const int64_t k = group * kLinearGroup, k0 = k / kLinearBlock * kLinearBlock;
      float* out = reinterpret_cast<float*>(x.data) + linear_tile_offset(x, m, k0) + (k - k0);
      for (int p = 0; p < kLinearGroup; ++p) out[p] = values[linear_column(x.lanes, p)];
    }
  }
}

float tree(std::array<float, kLinearLanes> acc) {
  for (int distance = kLinearLanes / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) acc[lane] += acc[lane + distance];
  }
  return acc[0];
}

float block_sum(Lanes lanes, const float* w, const float* x, const LaneScales& scales,
                int64_t count) {
  std::array<float, kLinearLanes> total{};
  for (int64_t k = 0; k < count; k += kLinearGroup) {
    std::array<float, kLinearLanes> fp4{};
    std::array<float, kLinearLanes>& acc = lanes == Lanes::kFp4 ? fp4 : total;
    for (int p = 0; p < kLinearGroup; ++p) {
      acc[p % kLinearLanes] = std::fmaf(w[k + p], x[k + p], acc[p % kLinearLanes]);
    }
    if (lanes == Lanes::kFp4) {
      const auto& scale = scales[k / kLinearGroup];
      for (int lane = 0; lane < kLinearLanes; ++lane) {
        total[lane] = std::fmaf(fp4[lane], scale[lane], total[lane]);
      }
    }
  }
  return tree(total);
}

// Columns [k0, k0 + count) of one row of W, in the order of `lanes`.
void expand(const Weight& w, Lanes lanes, int64_t row, int64_t k0, int64_t count, Block& values,
            LaneScales& scales) {
  for (int64_t p = 0; p < count; ++p) {
    const int64_t group = k0 + p / kLinearGroup * kLinearGroup;
    values[p] = weight_value(w, lanes, row,
                             group + linear_column(lanes, static_cast<int>(p % kLinearGroup)));
  }
  if (lanes != Lanes::kFp4) return;
  for (int64_t k = 0; k < count; k += kLinearGroup) {
    for (int lane = 0; lane < kLinearLanes; ++lane) {
      const int64_t col = k0 + k + lane / 4 * kFp4ScaleGroup;  // lanes 4g..4g+3: columns 32g..
      const uint8_t* row_scales = w.scale + row * w.scale_stride;
      scales[k / kLinearGroup][lane] =
          col < w.cols ? scale_value(row_scales[col / kFp4ScaleGroup]) : 1.0f;
    }
  }
}

void store(const Tensor& out, int64_t row, int64_t col, float value) {
  const int64_t element = row * out.strides[0] + col;
  if (out.dtype == DType::kF32) {
    static_cast<float*>(out.data)[element] = value;
  } else {
    static_cast<uint16_t*>(out.data)[element] = f32_to_bf16(value);
  }
}

void compute(const LinearTile& tile) {
  const PreparedX& x = *tile.x;
  Block values;
  LaneScales scales{};
  for (int64_t n = tile.n_begin; n < tile.n_end; ++n) {
    std::array<float, kRowsOfX> y{};
    for (int64_t k0 = 0; k0 < x.padded_cols; k0 += kLinearBlock) {
      const int64_t count = std::min<int64_t>(kLinearBlock, x.padded_cols - k0);
      expand(*tile.w, x.lanes, n, k0, count, values, scales);
      for (int64_t m = tile.m_begin; m < tile.m_end; ++m) {
        const float* row = reinterpret_cast<const float*>(x.data) + linear_tile_offset(x, m, k0);
        const float sum = block_sum(x.lanes, values.data(), row, scales, count);
        float& total = y[m - tile.m_begin];
        total = k0 == 0 ? sum : total + sum;
      }
    }
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m) store(tile.out, m, n, y[m - tile.m_begin]);
  }
}

int tile_rows(const Weight&, Lanes, int64_t) {
  return 1;
}

LinearBlocking blocking(const PreparedX&, const Weight&, int64_t, int) {
  return {kRowsOfX, kRowsOfW};
}

}  // namespace

const LinearKernels kLinearReference{
    .tile_rows = tile_rows,
    .blocking = blocking,
    .element_bytes_bf16 = sizeof(float),
    .scratch_bytes = 0,
    .prepare = prepare,
    .compute = compute,
};

}  // namespace dsv4::cpu
