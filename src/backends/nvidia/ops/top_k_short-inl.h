// top_k of a short row: one CTA, scores in registers.
//
// Problem   as in top_k-inl.h, rows of at most kShortRow scores
// Tiling    512 threads, thread t has scores [4 t, 4 t + 4) and those 2048 further on:
//             range      the smallest and the largest finite score
//             select     a histogram of 2048 bins, linear between the two, and the few keys of the
//                        k-th one's bin compared with each other; where they are many (ties, scores
//                        of very different magnitude), histograms of the keys' bits
//             emit       threads are in order: places are counts of what is taken before
// Budget    latency: a trip to memory, eight barriers; scores are on their way before the row's end
//           is known
// Launch    grid (tokens), 512 threads, smem = sizeof(TopKShortStorage) 9 KB
// Contract  as in top_k-inl.h
#pragma once
#include "backends/nvidia/ops/top_k_scan-inl.h"

namespace dsv4::nvidia {

struct TopKShortRange {
  uint32_t low[TopKTraits::kWarps], high[TopKTraits::kWarps];  // keys
};
struct TopKShortStorage {
  TopKSelection selection;
  TopKShortRange range;
};

class TopKShort {
 public:
  using Traits = TopKTraits;

  /// Asks for the scores of a row of at most `limit`, which may be longer than it is.
  __device__ void load(const float* row, int32_t limit) {
    const bool aligned = is_aligned_to_16(row);
#pragma unroll
    for (int u = 0; u < kVectors; ++u) scores_[u] = load_scores(row, first_of(u), limit, aligned);
  }

  /// k < n <= kShortRow. The selection is clear; a barrier is not needed.
  __device__ void run(TopKSelection& selection, TopKShortRange& range, int32_t n, int32_t k,
                      const TopKOutput& output) {
    // Slots follow from what a thread has: their blocks are on the way meanwhile.
    if (output.has_slots()) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          blocks_[u][c] = first_of(u) + c < n ? output.block_of(first_of(u) + c) : 0;
      }
    }
    uint32_t low = ~0u, high = 0;
    constexpr uint32_t kInfinity = 0xff800000u, kMinusInfinity = 0x007fffffu;  // as keys
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const float of_vector[4] = {scores_[u].x, scores_[u].y, scores_[u].z, scores_[u].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t key = first_of(u) + c < n ? order_key(of_vector[c]) : 0;
        keys_[u][c] = key;
        if (key > kMinusInfinity && key < kInfinity) low = min(low, key), high = max(high, key);
      }
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane_ == 0) range.low[warp_] = low, range.high[warp_] = high;
    __syncthreads();
    low = __reduce_min_sync(~0u, range.low[lane_ % Traits::kWarps]);
    high = __reduce_max_sync(~0u, range.high[lane_ % Traits::kWarps]);
    emit(n, selection.scan, select(selection, low, high, static_cast<uint32_t>(k)), output);
  }

 private:
  static constexpr int kVectors = Traits::kShortRow / (4 * Traits::kThreads);
  __device__ int32_t first_of(int u) const {
    return 4 * (u * Traits::kThreads + static_cast<int32_t>(threadIdx.x));
  }
  template <typename F>  // f(key, vector, component)
  __device__ void each(F&& f) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (keys_[u][c] != 0) f(keys_[u][c], u, c);
      }
    }
  }
  static __device__ float score_of(uint32_t key) {
    return __uint_as_float(key >> 31 != 0 ? key ^ 0x80000000u : ~key);
  }

  __device__ TopKThreshold select(TopKSelection& selection, uint32_t low, uint32_t high,
                                  uint32_t rank) const {
    // Never larger for a smaller score, whatever is rounded, overflows or is no number on the way:
    // -infinity and NaN go to bin 0, and where the range is infinite or empty, so does the rest or
    // all that is not above `low`.
    const float from = score_of(low), scale = (Traits::kBins - 1) / (score_of(high) - from);
    const auto bin_of = [&](uint32_t key) {
      return min(__float2uint_rz((score_of(key) - from) * scale), Traits::kBins - 1u);
    };
    if (low <= high) {
      each([&](uint32_t key, int, int) { atomicAdd(&selection.bins[bin_of(key)], 1u); });
      const TopKFound found = selection.scan.search(selection.bins, rank);
      if (found.count <= Traits::kFewKeys) {
        each([&](uint32_t key, int, int) {
          if (bin_of(key) == found.bin) selection.add_few(key);
        });
        return threshold_of_few(selection, found.rank);
      }
      selection.clear_bins();
    }
    __syncthreads();
    return find_threshold(
        selection, [&](auto&& f) { each([&](uint32_t key, int, int) { f(key); }); }, 0, ~0u, rank);
  }

  __device__ void emit(int32_t n, TopKScan& scan, TopKThreshold threshold,
                       const TopKOutput& output) const {
    // Above the threshold, and equal to it.
    constexpr uint32_t kHalf = 16;
    uint32_t larger_before = 0, same_before = 0;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (4 * u * Traits::kThreads >= n) break;
      uint32_t own = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c)
        own += keys_[u][c] > threshold.key ? 1u << kHalf : keys_[u][c] == threshold.key;
      uint32_t total;
      const uint32_t before = scan.sum_before(own, total, (u + 1) % 2);
      uint32_t larger = larger_before + (before >> kHalf);
      uint32_t same = same_before + (before & ((1u << kHalf) - 1));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool is_larger = keys_[u][c] > threshold.key;
        const bool is_same = keys_[u][c] == threshold.key;
        if (is_larger || (is_same && same < threshold.ties))
          output.put(larger + min(same, threshold.ties), first_of(u) + c, blocks_[u][c]);
        larger += is_larger;
        same += is_same;
      }
      larger_before += total >> kHalf;
      same_before += total & ((1u << kHalf) - 1);
    }
  }

  const uint32_t lane_ = threadIdx.x % 32, warp_ = threadIdx.x / 32;
  float4 scores_[kVectors];
  uint32_t keys_[kVectors][4];   // 0: past the end
  int32_t blocks_[kVectors][4];  // of the slots
};

/// A row of n <= kShortRow scores; the selection is clear.
__device__ inline void top_k_short_row(TopKSelection& selection, TopKShortRange& range,
                                       const TopKArgs& args, int64_t token, int32_t n,
                                       TopKShort& scores) {
  const TopKOutput output(args, token);
  if (threadIdx.x == 0) args.length[token] = min(n, args.k);
  if (n > args.k) return scores.run(selection, range, n, args.k, output);
  for (int32_t i = threadIdx.x; i < args.k; i += TopKTraits::kThreads)
    output.put(i, i < n ? i : -1);
}

}  // namespace dsv4::nvidia
