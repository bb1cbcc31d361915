// Hyper-connection products and mixes of one token (model.md 3).
#pragma once
#include "backends/cpu/ops/norm_rope-inl.h"

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

// Tile of rows x tokens whose sums stay in registers: 16 zmm, or 8 of the 16 narrower ones. A row
// of fn comes from L2 at 32 bytes a cycle, so four tokens share it.
constexpr int kDotRows = kParts == 1 ? 4 : 2;
constexpr int kDotTokens = kParts == 1 ? 4 : 2;
// Columns between two visits of a sum: kDotTokens rows of x in f32 fit L1 beside the sums.
constexpr int64_t kDotCols = 1024;
constexpr int64_t kMaxDotRows = (2 + kMaxHcStreams) * kMaxHcStreams;

// sums[r][t] += fn[r] . x[t] lane by lane: one chain of additions per lane over all columns.
template <int kRows, int kTokens>
DSV4_INLINE void hc_dot_tile(const float* x, const float* fn, int64_t fn_stride, int64_t cols,
                             Floats* sums) {
  Floats sum[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[r][t] = sums[r * kDotTokens + t];
  }
  for_vectors(cols, [&](int64_t i, auto lanes) {
    Floats value[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) value[t] = load(x + t * kDotCols + i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Floats weight = load(fn + r * fn_stride + i, lanes);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sum[r][t] = sum[r][t] + weight * value[t];
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sums[r * kDotTokens + t] = sum[r][t];
  }
}

// All rows, and x . x as one more.
template <int kTokens>
DSV4_INLINE void hc_dot_rows(const float* x, const float* fn, int64_t fn_stride, int64_t rows,
                             int64_t cols, Floats* sums) {
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows)
    hc_dot_tile<kDotRows, kTokens>(x, fn + r * fn_stride, fn_stride, cols, sums + r * kDotTokens);
  for (; r < rows; ++r)
    hc_dot_tile<1, kTokens>(x, fn + r * fn_stride, fn_stride, cols, sums + r * kDotTokens);
  for_vectors(cols, [&](int64_t i, auto lanes) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const Floats value = load(x + t * kDotCols + i, lanes);
      sums[rows * kDotTokens + t] = sums[rows * kDotTokens + t] + value * value;
    }
  });
}

DSV4_KERNEL void hc_dots(const void* x, DType act, int64_t x_stride, int64_t tokens,
                         const float* fn, int64_t fn_stride, int64_t rows, int64_t cols,
                         float* out) {
  alignas(64) float values[kDotTokens * kDotCols];
  Floats sums[(kMaxDotRows + 1) * kDotTokens];
  with_type(x, act, [&](const auto* from) {
    for (int64_t first = 0; first < tokens; first += kDotTokens) {
      const int64_t count = tokens - first < kDotTokens ? tokens - first : kDotTokens;
      for (int64_t i = 0; i < (rows + 1) * kDotTokens; ++i) sums[i] = broadcast(0);
      for (int64_t begin = 0; begin < cols; begin += kDotCols) {
        const int64_t size = cols - begin < kDotCols ? cols - begin : kDotCols;
        for (int64_t t = 0; t < count; ++t) {
          const auto* row = from + (first + t) * x_stride + begin;
          for_vectors(size, [&](int64_t i, auto lanes) {
            store(values + t * kDotCols + i, load(row + i, lanes), lanes);
          });
        }
        if (count == kDotTokens) {
          hc_dot_rows<kDotTokens>(values, fn + begin, fn_stride, rows, size, sums);
        } else {
          for (int64_t t = 0; t < count; ++t)
            hc_dot_rows<1>(values + t * kDotCols, fn + begin, fn_stride, rows, size, sums + t);
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t r = 0; r <= rows; ++r)
          out[(first + t) * (rows + 1) + r] = sum_lanes(sums[r * kDotTokens + t]);
      }
    }
  });
}

DSV4_KERNEL void hc_mix(const void* streams, DType act, int64_t stride, int64_t num_streams,
                        const float* coefficients, int64_t count, void* out) {
  with_type(streams, act, [&](const auto* x) {
    auto* to = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(x)>>*>(out);
    for_vectors(count, [&](int64_t i, auto lanes) {
      Floats sum = broadcast(coefficients[0]) * load(x + i, lanes);
      for (int64_t s = 1; s < num_streams; ++s)
        sum = sum + broadcast(coefficients[s]) * load(x + s * stride + i, lanes);
      store(to + i, sum, lanes);
    });
  });
}

template <int kStreams, typename T>
DSV4_INLINE void hc_post_of(const T* f, const float* post, const float* comb, int64_t stride,
                            int64_t count, T* streams) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    Floats source[kStreams];
    const Floats value = load(f + i, lanes);
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) source[s] = load(streams + s * stride + i, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < kStreams; ++j) {
      Floats sum = broadcast(post[j]) * value;
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) sum = sum + broadcast(comb[s * kStreams + j]) * source[s];
      store(streams + j * stride + i, sum, lanes);
    }
  });
}

// Any number of streams: same sums, through a buffer on the stack.
template <typename T>
DSV4_INLINE void hc_post_any(const T* f, const float* post, const float* comb, int64_t num_streams,
                             int64_t stride, int64_t count, T* streams) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    Floats source[kMaxHcStreams];
    const Floats value = load(f + i, lanes);
    for (int64_t s = 0; s < num_streams; ++s) source[s] = load(streams + s * stride + i, lanes);
    for (int64_t j = 0; j < num_streams; ++j) {
      Floats sum = broadcast(post[j]) * value;
      for (int64_t s = 0; s < num_streams; ++s)
        sum = sum + broadcast(comb[s * num_streams + j]) * source[s];
      store(streams + j * stride + i, sum, lanes);
    }
  });
}

DSV4_KERNEL void hc_post(const void* f, DType act, const float* post, const float* comb,
                         int64_t num_streams, int64_t stride, int64_t count, void* streams) {
  with_type(streams, act, [&](auto* x) {
    const auto* value = static_cast<decltype(x)>(const_cast<void*>(f));
    if (num_streams == 4) {
      hc_post_of<4>(value, post, comb, stride, count, x);
    } else {
      hc_post_any(value, post, comb, num_streams, stride, count, x);
    }
  });
}

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
