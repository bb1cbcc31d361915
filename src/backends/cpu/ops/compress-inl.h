// Compressor entries and indexer queries (compressor.md 1.3, 1.4, 2.2-2.4).
#pragma once
#include "backends/cpu/ops/norm_rope-inl.h"

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

template <typename Lanes>
DSV4_INLINE Floats pool_score(const PoolRow& row, int64_t i, Lanes lanes) {
  const Floats score = load(row.score + i, lanes);
  return row.ape == nullptr ? score : score + load(row.ape + i, lanes);
}

// Channels [begin, begin + 16 kVectors). Several vectors a row: rows are a multiple of 4 KiB apart
// (gates of 512 and 1024 channels), so they fall into the same cache sets, and every visit of a row
// should use whole runs of lines.
template <int kVectors, typename Lanes>
DSV4_INLINE void pool_channels(const PoolRow* rows, int64_t count, int64_t begin, Lanes lanes,
                               float* out) {
  Floats largest[kVectors], sum[kVectors], weighted[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    largest[v] = pool_score(rows[0], begin + v * kLanes, lanes);
    sum[v] = weighted[v] = broadcast(0);
  }
  for (int64_t k = 1; k < count; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      largest[v] = max(largest[v], pool_score(rows[k], begin + v * kLanes, lanes));
  }
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = begin + v * kLanes;
      const Floats p = exp(pool_score(rows[k], i, lanes) - largest[v]);
      sum[v] = sum[v] + p;
      weighted[v] = weighted[v] + p * load(rows[k].value + i, lanes);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(out + begin + v * kLanes, weighted[v] / sum[v], lanes);
}

DSV4_KERNEL void pool(const PoolRow* rows, int64_t count, int64_t width, float* out) {
  constexpr int kVectors = 4;
  int64_t begin = 0;
  for (; begin + kVectors * kLanes <= width; begin += kVectors * kLanes)
    pool_channels<kVectors>(rows, count, begin, Whole{}, out);
  for_vectors(width - begin,
              [&](int64_t i, auto lanes) { pool_channels<1>(rows, count, begin + i, lanes, out); });
}

// Four neighbours after the stages of half 1 and 2: sums in the same order as the plain loops
// below.
DSV4_INLINE Quad hadamard_quad(Quad x) {
  const Quad sign1 = {1, -1, 1, -1}, sign2 = {1, 1, -1, -1};
  x = __builtin_shufflevector(x, x, 1, 0, 3, 2) + x * sign1;
  return __builtin_shufflevector(x, x, 2, 3, 0, 1) + x * sign2;
}

// x <- x H / sqrt(width), H in natural (Sylvester) order; width is a power of two.
DSV4_INLINE void hadamard_in_place(float* row, int64_t width) {
  int64_t half = 1;
  if (width % 4 == 0) {
    for (int64_t i = 0; i < width; i += 4) {
      write(row + i, hadamard_quad(read<Quad>(row + i)));
    }
    for (half = 4; half < kLanes && half < width; half *= 2) {
      for (int64_t begin = 0; begin < width; begin += 2 * half) {
        for (int64_t i = begin; i < begin + half; i += 4) {
          const Quad a = read<Quad>(row + i), b = read<Quad>(row + i + half);
          write(row + i, a + b);
          write(row + i + half, a - b);
        }
      }
    }
  }
  for (; half < width; half *= 2) {
    for (int64_t begin = 0; begin < width; begin += 2 * half) {
      for_vectors(half, [&](int64_t i, auto lanes) {
        float *low = row + begin + i, *high = low + half;
        const Floats a = load(low, lanes), b = load(high, lanes);
        store(low, a + b, lanes);
        store(high, a - b, lanes);
      });
    }
  }
  const Floats factor = broadcast(1.0f / std::sqrt(static_cast<float>(width)));
  for_vectors(width,
              [&](int64_t i, auto lanes) { store(row + i, load(row + i, lanes) * factor, lanes); });
}

DSV4_INLINE void round_row_to_bf16(float* row, int64_t count) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    store(row + i, bf16_value(load(row + i, lanes)), lanes);
  });
}

DSV4_KERNEL void norm_entry(float* row, int64_t width, const void* weight, DType weight_dtype,
                            float eps, const RopeTable& rope, bool hadamard, bool round) {
  const float factor = inverse_rms(sum_squares(row, width), width, eps);
  scale_by_weight(row, weight, weight_dtype, width, factor, row);
  const int64_t nope = width - 2 * rope.pairs;
  rotate(row + nope, rope, 1.0f, row + nope);
  if (hadamard) hadamard_in_place(row, width);
  if (round) round_row_to_bf16(row, width);
}

DSV4_KERNEL void state_row(const float* gates, const float* ape, int64_t half, float* state) {
  for_vectors(half, [&](int64_t i, auto lanes) {
    store(state + i, load(gates + i, lanes), lanes);
    store(state + half + i, load(gates + half + i, lanes) + load(ape + i, lanes), lanes);
  });
}

DSV4_KERNEL float index_query(const void* head, DType act, int64_t count, const RopeTable& rope,
                              bool hadamard, IndexQuantise quantise, float* buffer, void* out) {
  with_type(head, act, [&](const auto* from) { rotated(from, count, rope, buffer); });
  if (hadamard) hadamard_in_place(buffer, count);
  if (quantise == IndexQuantise::kNone) {
    with_type(out, act, [&](auto* to) {
      for_vectors(count,
                  [&](int64_t i, auto lanes) { store(to + i, load(buffer + i, lanes), lanes); });
    });
    return 1.0f;
  }
  auto* to = static_cast<uint16_t*>(out);
  const auto rounded_from = [&](int64_t begin) {
    return [buffer, begin](int64_t i, auto lanes) {
      return bf16_value(load(buffer + begin + i, lanes));
    };
  };
  if (quantise == IndexQuantise::kFp8Row) {
    constexpr int kVectors = 8;  // index_head_dim 128
    return quantise_group<E4m3, kVectors, false>(rounded_from(0), count, 1e-4f, to);
  }
  constexpr int64_t kBlock = 32;
  constexpr float kAmaxFloor = 6 * 0x1p-126f;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    quantise_group<E2m1, 2, true>(rounded_from(begin), size, kAmaxFloor, to + begin);
  }
  return 1.0f;
}

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
