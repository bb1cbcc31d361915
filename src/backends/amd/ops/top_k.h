// top_k: exact selection of the k best scores of a row (ops.h), for AMD and the executor.
//
// Problem   n scores -> k indices: larger score first, then smaller index; NaN counts as -inf, -0
//           as +0; ascending indices, then -1
// Tiling    a block of 1024 lanes takes a row. Three histograms (11, 11 and 10 bits of an
//           order-preserving key) give the exact k-th key and how many of its ties are taken; then
//           every lane group counts what it takes of a contiguous part, and writes it in order
// Budget    4 n bytes read five times: once from memory, then from L2 (docs/kernels/index_amd.md)
// Launch    grid tokens, 1024 lanes, 8.5 KiB of shared memory
// Contract  any n and k; end <= k: identity. Logits need 4-byte alignment
// Numerics  integers only: exact
#pragma once
#include "backends/gpu/numbers.h"

namespace dsv4::amd {

using namespace gpu;  // NOLINT: kernels are written against the platform's few words

struct TopKArgs {
  const float* logits;
  int64_t logits_stride;
  const int32_t* end;
  int32_t* indices;
  int64_t indices_stride;
  int32_t* length;
  int32_t k;
};

struct TopK {
  using Params = TopKArgs;
  static constexpr int kThreads = 1024;
  static constexpr int kGroups = kThreads / kGroupLanes;
  static constexpr int kBins = 2 * kThreads;

  struct Storage {
    int32_t bins[kBins];
    int32_t above[kGroups], equal[kGroups];
    int32_t found_bin, found_above;
  };

  /// Order-preserving: a < b as scores <=> order_key(a) < order_key(b).
  DSV4_DEVICE static uint32_t order_key(float score) {
    uint32_t bits = bits_of(score);
    if (bits == 0x80000000u) bits = 0;      // -0 ties with +0
    if (is_nan(score)) bits = 0xff800000u;  // NaN -> -inf
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  }

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(Storage, storage);
    const int64_t token = block_idx();
    const float* row = args.logits + token * args.logits_stride;
    int32_t* out = args.indices + token * args.indices_stride;
    const int32_t n = args.end[token], k = args.k;
    const int32_t taken = n < k ? n : k;
    if (thread_idx() == 0) args.length[token] = taken;
    for (int32_t i = thread_idx(); i < k; i += kThreads) {
      if (n <= k) {
        out[i] = i < n ? i : -1;
      } else if (i >= taken) {
        out[i] = -1;
      }
    }
    if (n <= k) return;  // the whole block

    int32_t wanted = k;
    uint32_t key = find_digit<21, 11>(storage, row, n, 0, wanted);
    key = find_digit<10, 11>(storage, row, n, key, wanted);
    key = find_digit<0, 10>(storage, row, n, key, wanted);
    emit(storage, row, n, key, wanted, out);
  }

 private:
  /// Bits [kShift, kShift + kBits) of the `wanted`-th largest key of those that share the bits
  /// above with `key`; `wanted` becomes its rank among the keys that share these bits, too.
  template <int kShift, int kBits>
  DSV4_DEVICE static uint32_t find_digit(Storage& storage, const float* row, int32_t n,
                                         uint32_t key, int32_t& wanted) {
    constexpr uint32_t kDigits = 1u << kBits;
    static_assert(kDigits <= kBins);
    for (int b = thread_idx(); b < kBins; b += kThreads) storage.bins[b] = 0;
    block_sync();
    for (int32_t i = thread_idx(); i < n; i += kThreads) {
      const uint32_t here = order_key(row[i]);
      bool counts = true;
      if constexpr (kShift + kBits < 32) counts = (here ^ key) >> (kShift + kBits) == 0;
      if (counts) atomic_add(&storage.bins[(here >> kShift) & (kDigits - 1)], 1);
    }
    block_sync();
    // A lane holds two bins; how many keys lie in the bins of later lanes?
    const int even_bin = 2 * thread_idx();
    const int32_t even = storage.bins[even_bin], odd = storage.bins[even_bin + 1];
    int32_t above = even + odd;
    for (int distance = 1; distance < kGroupLanes; distance *= 2) {
      const int from = group_lane() + distance;
      const int32_t other = shuffle(above, from & (kGroupLanes - 1));
      if (from < kGroupLanes) above += other;
    }
    if (group_lane() == 0) storage.above[group_idx()] = above;
    above -= even + odd;
    block_sync();
    for (int g = group_idx() + 1; g < kGroups; ++g) above += storage.above[g];
    const bool in_odd = above < wanted && wanted <= above + odd;
    const bool in_even = above + odd < wanted && wanted <= above + odd + even;
    if (in_odd || in_even) {  // one lane of the block
      storage.found_bin = even_bin + (in_odd ? 1 : 0);
      storage.found_above = above + (in_odd ? 0 : odd);
    }
    block_sync();
    wanted -= storage.found_above;
    return key | static_cast<uint32_t>(storage.found_bin) << kShift;
  }

  /// Writes the indices of keys above `key`, and of the first `ties` equal to it, in order.
  DSV4_DEVICE static void emit(Storage& storage, const float* row, int32_t n, uint32_t key,
                               int32_t ties, int32_t* out) {
    const int32_t windows = (n + kGroupLanes - 1) / kGroupLanes;
    const int32_t part = (windows + kGroups - 1) / kGroups * kGroupLanes;
    const int32_t first = group_idx() * part;
    const int32_t end = first + part < n ? first + part : n;
    int32_t above = 0, equal = 0;
    for (int32_t i = first + group_lane(); i < end; i += kGroupLanes) {
      const uint32_t here = order_key(row[i]);
      above += here > key ? 1 : 0;
      equal += here == key ? 1 : 0;
    }
    for (int distance = kGroupLanes / 2; distance > 0; distance /= 2) {
      above += shuffle_xor(above, distance);
      equal += shuffle_xor(equal, distance);
    }
    if (group_lane() == 0) {
      storage.above[group_idx()] = above;
      storage.equal[group_idx()] = equal;
    }
    block_sync();
    int32_t above_before = 0, equal_before = 0;
    for (int g = 0; g < group_idx(); ++g) {
      above_before += storage.above[g];
      equal_before += storage.equal[g];
    }
    if (above == 0 && (equal == 0 || equal_before >= ties)) return;  // nothing here: the group
    const uint32_t below = (1u << group_lane()) - 1;
    for (int32_t begin = first; begin < end; begin += kGroupLanes) {
      const int32_t i = begin + group_lane();
      const uint32_t here = i < end ? order_key(row[i]) : 0;
      const uint32_t larger = group_ballot(here > key), ties_here = group_ballot(here == key);
      const int32_t tie = equal_before + std::popcount(ties_here & below);
      if (here > key || (here == key && tie < ties)) {
        const int32_t ties_taken = tie < ties ? tie : ties;
        out[above_before + std::popcount(larger & below) + ties_taken] = i;
      }
      above_before += std::popcount(larger);
      equal_before += std::popcount(ties_here);
    }
  }
};

}  // namespace dsv4::amd
