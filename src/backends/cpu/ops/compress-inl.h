// Compressor entries and indexer queries (compressor.md 1.3, 1.4, 2.2-2.4).
#pragma once
#include "backends/cpu/ops/norm_rope-inl.h"

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

template <typename Lanes>
DSV4_INLINE Floats pool_score(const PoolRow& row, int64_t i, Lanes lanes) {
  const Floats score = load(row.score + i, lanes);
  return row.ape == nullptr ? score : score + load(row.ape + i, lanes);
}

void pool(const PoolRow* rows, int64_t count, int64_t width, float* out) {
  for_vectors(width, [&](int64_t i, auto lanes) {
    Floats largest = pool_score(rows[0], i, lanes);
    for (int64_t k = 1; k < count; ++k) largest = max(largest, pool_score(rows[k], i, lanes));
    Floats sum = broadcast(0), weighted = broadcast(0);
    for (int64_t k = 0; k < count; ++k) {
      const Floats p = exp(pool_score(rows[k], i, lanes) - largest);
      sum = sum + p;
      weighted = weighted + p * load(rows[k].value + i, lanes);
    }
    store(out + i, weighted / sum, lanes);
  });
}

// x <- x H / sqrt(width), H in natural (Sylvester) order; width is a power of two.
DSV4_INLINE void hadamard_in_place(float* row, int64_t width) {
  for (int64_t half = 1; half < width; half *= 2) {
    for (int64_t begin = 0; begin < width; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; ++i) {
        const float a = row[i], b = row[i + half];
        row[i] = a + b;
        row[i + half] = a - b;
      }
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

void norm_entry(float* row, int64_t width, const void* weight, DType weight_dtype, float eps,
                const RopeTable& rope, bool hadamard, bool round) {
  const float factor = inverse_rms(sum_squares(row, width), width, eps);
  scale_by_weight(row, weight, weight_dtype, width, factor, row);
  const int64_t nope = width - 2 * rope.pairs;
  rotate(row + nope, rope, 1.0f, row + nope);
  if (hadamard) hadamard_in_place(row, width);
  if (round) round_row_to_bf16(row, width);
}

void state_row(const float* gates, const float* ape, int64_t half, float* state) {
  for_vectors(half, [&](int64_t i, auto lanes) {
    store(state + i, load(gates + i, lanes), lanes);
    store(state + half + i, load(gates + half + i, lanes) + load(ape + i, lanes), lanes);
  });
}

float index_query(const void* head, DType act, int64_t count, const RopeTable& rope, bool hadamard,
                  IndexQuantise quantise, float* buffer, void* out) {
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
  round_row_to_bf16(buffer, count);
  if (quantise == IndexQuantise::kFp8Row) {
    constexpr float kAmaxFloor = 1e-4f;
    const Scale scale = e4m3_scale(amax_of(buffer, count), kAmaxFloor);
    for_vectors(count, [&](int64_t i, auto lanes) {
      store(to + i, round_to_e4m3(load(buffer + i, lanes) * broadcast(scale.inverse)), lanes);
    });
    return scale.value;
  }
  constexpr int64_t kBlock = 32;
  constexpr float kAmaxFloor = 6 * 0x1p-126f;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    const Scale scale = scale_for(amax_of(buffer + begin, size), kAmaxFloor, kE2m1Max);
    for_vectors(size, [&](int64_t i, auto lanes) {
      const Floats code = round_to_e2m1(load(buffer + begin + i, lanes) * broadcast(scale.inverse));
      store(to + begin + i, code * broadcast(scale.value), lanes);
    });
  }
  return 1.0f;
}

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
