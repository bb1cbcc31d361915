// Norms and rotations of one row or head (attention.md steps 2-5, 9).
#pragma once
#include <cmath>

#include "backends/cpu/ops/quantise-inl.h"
#include "backends/cpu/ops/rowwise_kernels.h"
#include "backends/cpu/ops/vector-inl.h"

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

// Calls f with a pointer of the element type: uint16_t stands for bf16.
template <typename F>
DSV4_INLINE void with_type(const void* data, DType dtype, F f) {
  if (dtype == DType::kBf16) {
    f(static_cast<const uint16_t*>(data));
  } else {
    f(static_cast<const float*>(data));
  }
}
template <typename F>
DSV4_INLINE void with_type(void* data, DType dtype, F f) {
  if (dtype == DType::kBf16) {
    f(static_cast<uint16_t*>(data));
  } else {
    f(static_cast<float*>(data));
  }
}

// Scalar square root and division are correctly rounded on every ISA.
DSV4_INLINE float inverse_rms(float sum_squares, int64_t count, float eps) {
  return 1.0f / std::sqrt(sum_squares / static_cast<float>(count) + eps);
}

template <typename T>
DSV4_INLINE void scale_by_weight(const T* x, const void* weight, DType weight_dtype, int64_t count,
                                 float factor, auto* out) {
  with_type(weight, weight_dtype, [&](const auto* w) {
    for_vectors(count, [&](int64_t i, auto lanes) {
      store(out + i, load(x + i, lanes) * broadcast(factor) * load(w + i, lanes), lanes);
    });
  });
}

DSV4_KERNEL void rms_norm(const void* x, DType x_dtype, const void* weight, DType weight_dtype,
                          int64_t count, float eps, void* out, DType out_dtype) {
  with_type(x, x_dtype, [&](const auto* row) {
    const float factor = inverse_rms(sum_squares(row, count), count, eps);
    with_type(out, out_dtype,
              [&](auto* to) { scale_by_weight(row, weight, weight_dtype, count, factor, to); });
  });
}

// y[2i] = x[2i] cos - x[2i+1] sin, y[2i+1] = x[2i+1] cos + x[2i] sin, on factor * x.
template <typename T, typename U>
DSV4_INLINE void rotate(const T* from, const RopeTable& rope, float factor, U* to) {
  for_vectors(rope.pairs, [&](int64_t i, auto lanes) {
    Pairs x = load_pairs(from + 2 * i, lanes);
    x = {x.even * broadcast(factor), x.odd * broadcast(factor)};
    const Floats cos = load(rope.cos + i, lanes), sin = load(rope.sin + i, lanes);
    store_pairs(to + 2 * i, {x.even * cos - x.odd * sin, x.odd * cos + x.even * sin}, lanes);
  });
}

DSV4_KERNEL void qnorm_rope(void* head, DType act, int64_t count, float eps,
                            const RopeTable& rope) {
  const int64_t nope = count - 2 * rope.pairs;
  with_type(head, act, [&](auto* row) {
    const float factor = inverse_rms(sum_squares(row, count), count, eps);
    for_vectors(nope, [&](int64_t i, auto lanes) {
      store(row + i, load(row + i, lanes) * broadcast(factor), lanes);
    });
    rotate(row + nope, rope, factor, row + nope);
  });
}

DSV4_KERNEL void rope_kv(void* row, DType act, int64_t count, const RopeTable& rope,
                         float* values) {
  const int64_t nope = count - 2 * rope.pairs;
  with_type(row, act, [&](auto* kv) {
    rotate(kv + nope, rope, 1.0f, kv + nope);
    for_vectors(count,
                [&](int64_t i, auto lanes) { store(values + i, load(kv + i, lanes), lanes); });
  });
}

// The head in f32, rotated.
template <typename T>
DSV4_INLINE void rotated(const T* head, int64_t count, const RopeTable& rope, float* out) {
  const int64_t nope = count - 2 * rope.pairs;
  for_vectors(nope, [&](int64_t i, auto lanes) { store(out + i, load(head + i, lanes), lanes); });
  rotate(head + nope, rope, 1.0f, out + nope);
}

DSV4_KERNEL void inverse_rope(const void* head, DType act, int64_t count, const RopeTable& rope,
                              bool quantise, float* buffer, void* out, DType out_dtype) {
  with_type(head, act, [&](const auto* from) {
    with_type(out, out_dtype, [&](auto* to) {
      const int64_t nope = count - 2 * rope.pairs;
      if (!quantise) {
        for_vectors(nope,
                    [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
        rotate(from + nope, rope, 1.0f, to + nope);
        return;
      }
      // All scales of up to four groups first: a scale is a long chain of dependent instructions,
      // and four of them overlap. Groups before the rotated tail come straight from the head, the
      // others through `buffer`.
      constexpr int64_t kGroup = 128, kBatch = 4;
      constexpr float kAmaxFloor = 1e-10f;  // o_proj.md 4
      const int64_t plain = nope / kGroup * kGroup;
      rotated(from + plain, count - plain, rope, buffer);
      const auto for_groups = [&](int64_t first, auto f) {
        for (int64_t g = 0; g < kBatch && first + g * kGroup < count; ++g) {
          const int64_t begin = first + g * kGroup;
          const int64_t size = count - begin < kGroup ? count - begin : kGroup;
          if (begin < plain) {
            f(g, begin, size, [&](int64_t i, auto lanes) { return load(from + begin + i, lanes); });
          } else {
            const float* values = buffer + (begin - plain);
            f(g, begin, size, [&](int64_t i, auto lanes) { return load(values + i, lanes); });
          }
        }
      };
      for (int64_t first = 0; first < count; first += kBatch * kGroup) {
        Scale scales[kBatch];
        for_groups(first, [&](int64_t g, int64_t, int64_t size, auto load_at) {
          scales[g] = group_scale<E4m3>(load_at, size, kAmaxFloor);
        });
        // Codes are 2^-9 at least and scales 2^-42: nothing flushes to zero in bf16.
        for_groups(first, [&](int64_t g, int64_t begin, int64_t size, auto load_at) {
          store_group<E4m3, true>(load_at, size, scales[g], to + begin);
        });
      }
    });
  });
}

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
