// top_k: keys, teams of CTAs, and the search in a histogram, which both ways of top_k-inl.h use.
#pragma once
#include <cstdint>

#include "backends/nvidia/ops/top_k.h"

namespace dsv4::nvidia {

struct TopKTraits {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxK = 2048;
  static constexpr int kMaxTeam = 16;
  static constexpr int kBins = 2048;
  static constexpr uint32_t kBinBits = 11;
  static constexpr int kGroups = 64;        // of the sample
  static constexpr int kMaxRun = 16;        // neighbours that a thread samples
  static constexpr int kKeys = 8192;        // of a row, listed
  static constexpr int kEverything = 4096;  // rows up to this are listed whole
  static constexpr uint32_t kFewKeys = 32;  // are compared with each other
};

/// Scores above the k-th key, and equal to it.
struct TopKCounts {
  uint32_t above, equal;
};

/// Scores [begin, end) of a row of n are the part of `rank`; multiples of 4, so that a part is
/// aligned as its row is.
struct TopKPart {
  int32_t begin, end;
};
__device__ inline TopKPart part_of(int32_t n, uint32_t rank, uint32_t size) {
  const int64_t step = (int64_t{n} + 4 * size - 1) / (4 * size) * 4;
  return {static_cast<int32_t>(min(int64_t{n}, rank * step)),
          static_cast<int32_t>(min(int64_t{n}, (rank + 1) * step))};
}

/// A team of one.
struct SingleCta {
  static constexpr bool kSingle = true;
  __device__ uint32_t rank() const { return 0; }
  __device__ uint32_t size() const { return 1; }
  __device__ void arrive() const {}
  __device__ void wait() const {}
  __device__ void add(uint32_t* local, uint32_t, uint32_t value) const { atomicAdd(local, value); }
  __device__ void store(uint32_t* local, uint32_t, uint32_t value) const { *local = value; }
  __device__ uint2 load(const uint2* local, uint32_t) const { return *local; }
};

/// Order-preserving: a < b as scores <=> key(a) < key(b). Never 0.
__device__ inline uint32_t order_key(float score) {
  uint32_t bits = __float_as_uint(score);
  if (bits == 0x80000000u) bits = 0;                           // -0 ties with +0
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;  // NaN -> -inf
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

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

}  // namespace dsv4::nvidia
