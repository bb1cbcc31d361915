// top_k: keys, the search of the k-th key in histograms, and what is taken as bits of the row; used
// by rows of every length.
#pragma once
#include <cstdint>

#include "backends/nvidia/ops/top_k.h"

namespace dsv4::nvidia {

struct TopKTraits {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxK = 2048;
  static constexpr int kBins = 2048;
  static constexpr uint32_t kBinBits = 11;
  static constexpr uint32_t kFewKeys = 32;  // are compared with each other
  static constexpr int kShortRow = 4096;    // stay in registers
};

/// Order-preserving: a < b as scores <=> key(a) < key(b). Never 0.
__device__ inline uint32_t order_key(float score) {
  uint32_t bits = __float_as_uint(score);
  if (bits == 0x80000000u) bits = 0;                           // -0 ties with +0
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;  // NaN -> -inf
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

/// Scores [at, at + 4) of a row of `limit`; NaN past the end.
__device__ inline float4 load_scores(const float* row, int32_t at, int32_t limit, bool aligned) {
  float4 value = make_float4(NAN, NAN, NAN, NAN);
  if (aligned && at + 4 <= limit) {
    value = __ldg(reinterpret_cast<const float4*>(row + at));
  } else if (at < limit) {
    value.x = __ldg(row + at);
    if (at + 1 < limit) value.y = __ldg(row + at + 1);
    if (at + 2 < limit) value.z = __ldg(row + at + 2);
    if (at + 3 < limit) value.w = __ldg(row + at + 3);
  }
  return value;
}
__device__ inline bool is_aligned_to_16(const float* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

/// Where the entries of a token go.
class TopKOutput {
 public:
  __device__ TopKOutput(const TopKArgs& args, int64_t token)
      : args_(args),
        indices_(args.indices + token * args.indices_stride),
        slots_(args.slots == nullptr ? nullptr : args.slots + token * args.slots_stride) {
    if (slots_ != nullptr)
      blocks_ = args.blocks + __ldg(args.token_to_seq + token) * args.blocks_stride;
  }

  /// -1 is none.
  __device__ void put(uint32_t place, int32_t entry) const {
    indices_[place] = entry;
    if (slots_ != nullptr) slots_[place] = entry < 0 ? -1 : slot_of(entry, block_of(entry));
  }
  /// With the block of the entry.
  __device__ void put(uint32_t place, int32_t entry, int32_t block) const {
    indices_[place] = entry;
    if (slots_ != nullptr) slots_[place] = slot_of(entry, block);
  }
  __device__ bool has_slots() const { return slots_ != nullptr; }
  __device__ int32_t block_of(int32_t entry) const {
    const int32_t logical = logical_of(entry);
    const int32_t columns = args_.block_columns;
    return __ldg(blocks_ + (logical < columns ? logical : logical % columns));
  }

 private:
  __device__ int32_t logical_of(int32_t entry) const {
    return args_.block_shift >= 0 ? entry >> args_.block_shift : entry / args_.rows_per_block;
  }
  __device__ int32_t slot_of(int32_t entry, int32_t block) const {
    return (block - logical_of(entry)) * args_.rows_per_block + entry;
  }
  const TopKArgs& args_;
  int32_t* indices_;
  int32_t* slots_;
  const int32_t* blocks_ = nullptr;
};

/// A bin, what is in it, and the rank of the score that was looked for among that.
struct TopKFound {
  uint32_t bin, count, rank;
};

/// Sums over a CTA. In shared memory; all threads call together.
struct TopKScan {
  alignas(16) uint32_t sums[2][TopKTraits::kWarps];
  TopKFound found;

  /// Sum of `own` over the threads before this one, and over all. `turn` is 0, 1, 0, ... by call:
  /// the sums change places, and one barrier is enough.
  __device__ uint32_t sum_before(uint32_t own, uint32_t& total, uint32_t turn) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= static_cast<uint32_t>(step)) sum += other;
    }
    if (lane == 31) sums[turn][warp] = sum;
    __syncthreads();
    const uint32_t of_warp = lane < TopKTraits::kWarps ? sums[turn][lane] : 0;
    total = __reduce_add_sync(~0u, of_warp);
    return __reduce_add_sync(~0u, lane < warp ? of_warp : 0) + sum - own;
  }

  /// The largest bin that has the `rank`-th score from above; 1 <= rank <= sum of all bins. Begins
  /// and ends with a barrier.
  __device__ TopKFound search(const uint32_t* bins, uint32_t rank) {
    static_assert(TopKTraits::kBins == 4 * TopKTraits::kThreads);
    __syncthreads();
    const int last = TopKTraits::kBins - 4 - static_cast<int>(threadIdx.x) * 4;
    const uint4 own = *reinterpret_cast<const uint4*>(bins + last);
    uint32_t total;
    uint32_t before = sum_before(own.x + own.y + own.z + own.w, total, 0);
    const uint32_t counts[4] = {own.w, own.z, own.y, own.x};  // from above
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (before < rank && rank <= before + counts[i])
        found = {static_cast<uint32_t>(last + 3 - i), counts[i], rank - before};
      before += counts[i];
    }
    __syncthreads();
    return found;
  }
};

/// What a selection needs of shared memory, whatever the keys come from.
struct TopKSelection {
  TopKScan scan;
  alignas(16) uint32_t bins[TopKTraits::kBins];
  uint32_t few_size;
  uint32_t few[TopKTraits::kFewKeys];

  /// By all threads; a barrier must follow.
  __device__ void clear() {
    clear_bins();
    if (threadIdx.x == 0) few_size = 0;
  }
  __device__ void clear_bins() {
    static_assert(TopKTraits::kBins == 4 * TopKTraits::kThreads);
    reinterpret_cast<uint4*>(bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  }
  __device__ void add_few(uint32_t key) { few[atomicAdd(&few_size, 1u)] = key; }
};

/// The k-th key, and how many of those that equal it are taken.
struct TopKThreshold {
  uint32_t key, ties;
};

/// The `rank`-th of the few keys; begins with a barrier.
__device__ inline TopKThreshold threshold_of_few(TopKSelection& selection, uint32_t rank) {
  __syncthreads();
  // By every warp.
  const uint32_t lane = threadIdx.x % 32, few = selection.few_size;
  const uint32_t mine = lane < few ? selection.few[lane] : 0;
  uint32_t larger = 0;
  for (uint32_t j = 0; j < few; ++j) larger += __shfl_sync(~0u, mine, static_cast<int>(j)) > mine;
  const uint32_t key = __reduce_min_sync(~0u, lane < few && larger < rank ? mine : ~0u);
  return {key, rank - __popc(__ballot_sync(~0u, lane < few && mine > key))};
}

/// The `rank`-th key from above among those from `low` on, most of which are less than `width`
/// above it. `each` calls its argument with every key of this thread. Bins are clear, a barrier
/// behind.
template <typename Each>
__device__ TopKThreshold find_threshold(TopKSelection& selection, Each&& each, uint32_t low,
                                        uint32_t width, uint32_t rank) {
  uint32_t high = ~0u;
#pragma unroll 1
  while (true) {
    // Bins of 2^shift keys; what is above the last bin falls into it.
    const uint32_t used = 32 - __clz(static_cast<int>(width));
    const uint32_t shift = used > TopKTraits::kBinBits ? used - TopKTraits::kBinBits : 0;
    each([&](uint32_t key) {
      if (key < low || key > high) return;
      atomicAdd(&selection.bins[min((key - low) >> shift, TopKTraits::kBins - 1u)], 1u);
    });
    const TopKFound found = selection.scan.search(selection.bins, rank);
    low += found.bin << shift;
    if (found.bin != TopKTraits::kBins - 1u && (high - low) >> shift != 0)
      high = low + ((1u << shift) - 1);
    rank = found.rank;
    if (found.count <= TopKTraits::kFewKeys) break;
    if (low == high) return {low, rank};
    width = high - low;
    selection.clear_bins();
    __syncthreads();
  }
  each([&](uint32_t key) {
    if (key >= low && key <= high) selection.add_few(key);
  });
  return threshold_of_few(selection, rank);
}

/// Taken scores as bits, window by window of a row.
template <int kScores>
struct TopKBits {
  static constexpr int kWindow = kScores;
  static constexpr int kWords = kWindow / 32;
  static constexpr int kThreadWords = kWords / TopKTraits::kThreads;
  static_assert(kThreadWords == 2 || kThreadWords == 4);
  alignas(16) uint32_t above[kWords], equal[kWords];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kThreadWords; ++i) {
      above[threadIdx.x + i * TopKTraits::kThreads] = 0;
      equal[threadIdx.x + i * TopKTraits::kThreads] = 0;
    }
  }

  /// 32 scores, and how many are taken before them.
  struct Word {
    uint32_t above, equal, larger, same;
    int32_t at;

    /// By all lanes, each with a word. Crowded ones are taken by the warp, as the best scores may
    /// all be neighbours.
    __device__ void take(uint32_t ties, int32_t* taken) const {
      constexpr int kFew = 3;
      const bool is_crowded = __popc(above | equal) > kFew;
      for (uint32_t bits = is_crowded ? 0 : above | equal; bits != 0; bits &= bits - 1)
        take_bit(bits & ~(bits - 1), ties, taken);
      for (uint32_t lanes = __ballot_sync(~0u, is_crowded); lanes != 0; lanes &= lanes - 1) {
        const int lane = __ffs(static_cast<int>(lanes)) - 1;
        const Word word{__shfl_sync(~0u, above, lane), __shfl_sync(~0u, equal, lane),
                        __shfl_sync(~0u, larger, lane), __shfl_sync(~0u, same, lane),
                        __shfl_sync(~0u, at, lane)};
        const uint32_t bit = 1u << threadIdx.x % 32;
        if (((word.above | word.equal) & bit) != 0) word.take_bit(bit, ties, taken);
      }
    }
    __device__ void take_bit(uint32_t bit, uint32_t ties, int32_t* taken) const {
      const uint32_t ties_before = same + __popc(equal & (bit - 1));
      if ((equal & bit) != 0 && ties_before >= ties) return;
      taken[larger + __popc(above & (bit - 1)) + min(ties_before, ties)] =
          at + 31 - __clz(static_cast<int>(bit));
    }
  };

  /// Indices of what is above the threshold and of the first `ties` that equal it, ascending, to
  /// taken[0, k). mark(base) sets the bits of scores [base, base + kWindow), which are clear; a
  /// barrier must follow before `taken` is read.
  template <typename Mark>
  __device__ void take(TopKScan& scan, int32_t n, uint32_t k, uint32_t ties, int32_t* taken,
                       Mark&& mark) {
    constexpr uint32_t kEqualBits = 17;  // a window is full of them; above are 2047 at most
    static_assert(kWindow < 1 << kEqualBits);
    uint32_t above_before = 0, equal_before = 0, turn = 0;
#pragma unroll 1
    for (int32_t base = 0; base < n && above_before + min(equal_before, ties) < k;
         base += kWindow) {
      if (base > 0) __syncthreads();
      mark(base);
      __syncthreads();
      // Short rows: fewer words a thread, so that all threads have some.
      const int words =
          (min(kWindow, n - base) + 32 * TopKTraits::kThreads - 1) / (32 * TopKTraits::kThreads);
      const uint32_t first = threadIdx.x * words;
      uint32_t own = 0;
#pragma unroll 1
      for (int i = 0; i < words; ++i)
        own += (__popc(above[first + i]) << kEqualBits) + __popc(equal[first + i]);
      uint32_t total;
      const uint32_t before = scan.sum_before(own, total, turn ^= 1);
      uint32_t larger = above_before + (before >> kEqualBits);
      uint32_t same = equal_before + (before & ((1u << kEqualBits) - 1));
#pragma unroll 1
      for (int i = 0; i < words; ++i) {
        const Word word{above[first + i], same < ties ? equal[first + i] : 0, larger, same,
                        base + 32 * static_cast<int32_t>(first + i)};
        word.take(ties, taken);
        larger += __popc(word.above);
        same += __popc(word.equal);
        above[first + i] = equal[first + i] = 0;
      }
      above_before += total >> kEqualBits;
      equal_before += total & ((1u << kEqualBits) - 1);
    }
  }
};

}  // namespace dsv4::nvidia
