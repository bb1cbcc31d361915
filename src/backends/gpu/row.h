// One row held by a lane group, and what row-wise kernels do with it: load, store, sum of squares,
// rotation, Hadamard. Sums and products have the order of the CPU's row kernels
// (backends/cpu/ops/vector-inl.h), so results have the same bits there and here.
#pragma once
#include "backends/gpu/math.h"

namespace dsv4::gpu {

/// Elements that a group covers with one access of two neighbours a lane.
constexpr int kVectorElems = 2 * kGroupLanes;

/// Lane l holds elements 64 i + 2 l (even) and 64 i + 2 l + 1 (odd) of vector i; what lies beyond
/// the row is zero.
template <int kVectors>
struct Row {
  static constexpr int kMaxElems = kVectors * kVectorElems;
  float even[kVectors];
  float odd[kVectors];
};

/// Index of the even element that this lane holds of vector i. With `kGroups` > 1 the row is spread
/// over the groups of the block: group g has every kGroups-th vector from g on.
template <int kGroups = 1>
DSV4_DEVICE int row_elem(int i) {
  const int vector = kGroups == 1 ? i : i * kGroups + group_idx();
  return vector * kVectorElems + 2 * group_lane();
}

// ---- pairs in memory

struct Pair {
  float even, odd;
};
DSV4_DEVICE Pair load_pair(const Bf16* from) {
  const uint32_t pair = load_as<Words<1>>(from).word[0];
  return {even_of(pair), odd_of(pair)};
}
DSV4_DEVICE Pair load_pair(const float* from) {
  const Words<2> pair = load_as<Words<2>>(from);
  return {float_of(pair.word[0]), float_of(pair.word[1])};
}
DSV4_DEVICE void store_pair(Bf16* to, Pair pair) {
  store_as(to, Words<1>{{pack_bf16(pair.even, pair.odd)}});
}
DSV4_DEVICE void store_pair(float* to, Pair pair) {
  store_as(to, Words<2>{{bits_of(pair.even), bits_of(pair.odd)}});
}
/// May pairs of this row be moved at once? The same answer in all lanes.
template <typename T>
DSV4_DEVICE bool has_aligned_pairs(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % (2 * sizeof(T)) == 0;
}
/// How a row is moved; decided by the host, so that kernels hold one way each.
enum class Access : uint8_t {
  kWhole,  ///< aligned pairs, and the row has exactly as many elements as the registers hold
  kPairs,  ///< aligned pairs, an even number of elements
  kElems,  ///< any alignment, any number
};

template <int kVectors, Access kAccess, int kGroups = 1, typename T>
DSV4_DEVICE Row<kVectors> load_row(const T* from, int count) {
  Row<kVectors> row;
  if (kAccess == Access::kElems) count = opaque(count);
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int elem = row_elem<kGroups>(i);
    Pair pair{0.0f, 0.0f};
    if constexpr (kAccess == Access::kElems) {
      if (elem < count) pair.even = to_float(from[elem]);
      if (elem + 1 < count) pair.odd = to_float(from[elem + 1]);
    } else {
      if (kAccess == Access::kWhole || elem < count) pair = load_pair(from + elem);
    }
    row.even[i] = pair.even;
    row.odd[i] = pair.odd;
  }
  return row;
}

/// Vectors from `first_vector` on, one rounding.
template <Access kAccess, int kGroups = 1, int kVectors, typename T>
DSV4_DEVICE void store_row(T* to, int count, const Row<kVectors>& row, int first_vector = 0) {
  if (kAccess != Access::kWhole) count = opaque(count);
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    if (i < first_vector) continue;
    const int elem = row_elem<kGroups>(i);
    if constexpr (kAccess == Access::kElems) {
      if (elem < count) to[elem] = from_float<T>(row.even[i]);
      if (elem + 1 < count) to[elem + 1] = from_float<T>(row.odd[i]);
    } else {
      if (kAccess == Access::kWhole || elem < count)
        store_pair(to + elem, {row.even[i], row.odd[i]});
    }
  }
}

/// A row of either type: weights.
template <int kVectors, Access kAccess, int kGroups = 1>
DSV4_DEVICE Row<kVectors> load_weights(const void* from, bool is_bf16, int count) {
  return is_bf16 ? load_row<kVectors, kAccess, kGroups>(static_cast<const Bf16*>(from), count)
                 : load_row<kVectors, kAccess, kGroups>(static_cast<const float*>(from), count);
}

// ---- sums

/// Sums of the residue classes modulo 64 of a row: lane l has those of 2 l and 2 l + 1, each added
/// up in ascending order.
struct SquareSums {
  float even = 0.0f, odd = 0.0f;
  DSV4_DEVICE void add(Pair pair) {
    even = even + pair.even * pair.even;
    odd = odd + pair.odd * pair.odd;
  }
  /// (r, r + 16), pairs of those 32 apart, then 8, 4, 2 and 1 apart; the same bits in all lanes.
  DSV4_DEVICE float total() const {
    float a = even, b = odd;
    constexpr int kDistances[] = {8, 16, 4, 2, 1};  // in lanes: half of it in elements
    DSV4_UNROLL
    for (int i = 0; i < 5; ++i) {
      a = a + shuffle_xor(a, kDistances[i]);
      b = b + shuffle_xor(b, kDistances[i]);
    }
    return a + b;
  }
};

template <int kVectors>
DSV4_DEVICE float sum_squares(const Row<kVectors>& row) {
  SquareSums sums;
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) sums.add({row.even[i], row.odd[i]});
  return sums.total();
}

/// 1 / sqrt(mean + eps).
DSV4_DEVICE float inverse_rms(float sum_squares, int count, float eps) {
  return 1.0f / sqrt(sum_squares / static_cast<float>(count) + eps);
}

/// row * factor * weight, in this order.
template <int kVectors>
DSV4_DEVICE void scale_row(Row<kVectors>& row, float factor, const Row<kVectors>& weight) {
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    row.even[i] = row.even[i] * factor * weight.even[i];
    row.odd[i] = row.odd[i] * factor * weight.odd[i];
  }
}
template <int kVectors>
DSV4_DEVICE void scale_row(Row<kVectors>& row, float factor) {
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    row.even[i] = row.even[i] * factor;
    row.odd[i] = row.odd[i] * factor;
  }
}

/// Magnitude bits order floats as integers, and any NaN is larger than infinity.
DSV4_DEVICE uint32_t magnitude_bits(float value) {
  return bits_of(value) & 0x7fffffffu;
}
template <int kVectors>
DSV4_DEVICE uint32_t max_magnitude(const Row<kVectors>& row, int i) {
  const uint32_t even = magnitude_bits(row.even[i]), odd = magnitude_bits(row.odd[i]);
  return even < odd ? odd : even;
}

template <int kVectors>
DSV4_DEVICE void round_row_to_bf16(Row<kVectors>& row) {
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t pair = pack_bf16(row.even[i], row.odd[i]);
    row.even[i] = even_of(pair);
    row.odd[i] = odd_of(pair);
  }
}

// ---- rotation

struct Rope {
  const float* frequencies;
  int32_t pairs;  // rotates the last 2 * pairs elements of a row
};

/// cos and sin of one position in shared memory, for blocks whose rows share it.
struct RopeTable {
  static constexpr int kMaxPairs = 256;
  CosSin angle[kMaxPairs];

  /// By all lanes of the block; a barrier must follow. `direction` -1 rotates back.
  template <int kThreads>
  DSV4_DEVICE void fill(const Rope& rope, int32_t position, float direction) {
    for (int p = thread_idx(); p < rope.pairs; p += kThreads) {
      const CosSin at = rope_angle(position, rope.frequencies[p]);
      angle[p] = {at.cos, direction < 0 ? -at.sin : at.sin};
    }
  }
};

/// y[2p] = x[2p] cos - x[2p+1] sin, y[2p+1] = x[2p+1] cos + x[2p] sin over the tail of a row of
/// `count`, an even number; `angle_of(p)` gives cos and sin of pair p.
template <int kGroups = 1, int kVectors, typename AngleOf>
DSV4_DEVICE void rotate_tail(Row<kVectors>& row, int count, int pairs, AngleOf angle_of) {
  if (kVectors > 8) count = opaque(count);
  const int nope = count - 2 * pairs;
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int elem = row_elem<kGroups>(i);
    if (elem < nope || elem >= count) continue;
    const CosSin at = angle_of((elem - nope) / 2);
    const float even = row.even[i], odd = row.odd[i];
    row.even[i] = even * at.cos - odd * at.sin;
    row.odd[i] = odd * at.cos + even * at.sin;
  }
}

// ---- Hadamard

/// x <- x H / sqrt(count), H in natural (Sylvester) order; `count` is a power of two.
template <int kVectors>
DSV4_DEVICE void hadamard_row(Row<kVectors>& row, int count) {
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const float a = row.even[i], b = row.odd[i];
    row.even[i] = a + b;
    row.odd[i] = a - b;
  }
  for (int distance = 1; distance < kGroupLanes && 2 * distance < count; distance *= 2) {
    const bool upper = (group_lane() & distance) != 0;
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const float even = shuffle_xor(row.even[i], distance);
      const float odd = shuffle_xor(row.odd[i], distance);
      row.even[i] = upper ? even - row.even[i] : row.even[i] + even;
      row.odd[i] = upper ? odd - row.odd[i] : row.odd[i] + odd;
    }
  }
  DSV4_UNROLL
  for (int distance = 1; distance < kVectors; distance *= 2) {
    if (distance * kVectorElems >= count) break;
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if ((i & distance) != 0 || i + distance >= kVectors) continue;
      const float even = row.even[i], odd = row.odd[i];
      row.even[i] = even + row.even[i + distance];
      row.even[i + distance] = even - row.even[i + distance];
      row.odd[i] = odd + row.odd[i + distance];
      row.odd[i + distance] = odd - row.odd[i + distance];
    }
  }
  scale_row(row, 1.0f / sqrt(static_cast<float>(count)));
}

}  // namespace dsv4::gpu
