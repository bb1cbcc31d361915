// Hyper-connection products and mixes of one token (model.md 3).
#pragma once
#include "backends/cpu/ops/norm_rope-inl.h"

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

// kRows x kTokens dot products over one block of columns: one accumulator of 16 lanes each, then
// the lane tree. 4 x 2 keeps eight chains of additions in flight (latency 3-4).
template <int kRows, int kTokens>
DSV4_INLINE void hc_dot_tile(const float* const* x, const float* fn, int64_t fn_stride,
                             int64_t cols, int64_t out_stride, float* out) {
  Floats sum[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) sum[r][t] = broadcast(0);
  }
  for_vectors(cols, [&](int64_t i, auto lanes) {
    Floats value[kTokens];
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) value[t] = load(x[t] + i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Floats weight = load(fn + r * fn_stride + i, lanes);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) sum[r][t] = sum[r][t] + weight * value[t];
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) out[t * out_stride + r] = sum_lanes(sum[r][t]);
  }
}

template <int kTokens>
DSV4_INLINE void hc_dots_of(const float* const* x, const float* fn, int64_t fn_stride, int64_t rows,
                            int64_t cols, float* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    hc_dot_tile<4, kTokens>(x, fn + r * fn_stride, fn_stride, cols, rows + 1, out + r);
  for (; r < rows; ++r)
    hc_dot_tile<1, kTokens>(x, fn + r * fn_stride, fn_stride, cols, rows + 1, out + r);
  for (int t = 0; t < kTokens; ++t) out[t * (rows + 1) + rows] = sum_squares(x[t], cols);
}

void hc_dots(const void* x, DType act, int64_t x_stride, int64_t tokens, const float* fn,
             int64_t fn_stride, int64_t rows, int64_t cols, float* out) {
  alignas(64) float buffer[2][kHcDotCols];
  const float* pointers[2] = {buffer[0], buffer[1]};
  with_type(x, act, [&](const auto* from) {
    for (int64_t t = 0; t < tokens; t += 2) {
      const int64_t count = tokens - t < 2 ? 1 : 2;
      for (int64_t j = 0; j < count; ++j) {
        const auto* row = from + (t + j) * x_stride;
        for_vectors(cols, [&](int64_t i, auto lanes) {
          store(buffer[j] + i, load(row + i, lanes), lanes);
        });
      }
      float* to = out + t * (rows + 1);
      if (count == 2) {
        hc_dots_of<2>(pointers, fn, fn_stride, rows, cols, to);
      } else {
        hc_dots_of<1>(pointers, fn, fn_stride, rows, cols, to);
      }
    }
  });
}

void hc_mix(const void* streams, DType act, int64_t stride, int64_t num_streams,
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

void hc_post(const void* f, DType act, const float* post, const float* comb, int64_t num_streams,
             int64_t stride, int64_t count, void* streams) {
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
