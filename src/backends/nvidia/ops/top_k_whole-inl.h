// top_k of a row whose sample was wrong: three histograms of all keys (11, 11 and 10 bits) give the
// exact k-th key. One CTA reads the row in every step, from L2.
#pragma once
#include "backends/nvidia/ops/top_k_scan-inl.h"

namespace dsv4::nvidia {

/// f(score, is_above, is_equal) of the scores [base, base + kScores) of a row of n, a warp for 128
/// neighbours: sets their bits where it says so. No others set bits of these words.
template <int kScores, typename F>
__device__ void mark_row(TopKBits<kScores>& bits, const float* row, int32_t base, int32_t n,
                         F&& f) {
  constexpr int kUnroll = 4;  // loads on their way
  constexpr int kStrip = 128;
  const bool aligned = is_aligned_to_16(row);
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  const auto warp = static_cast<int32_t>(threadIdx.x / 32);
  const int32_t count = min(kScores, n - base);
#pragma unroll 1
  for (int32_t first = warp; first * kStrip < count; first += kUnroll * TopKTraits::kWarps) {
    float4 scores[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int32_t at = kStrip * (first + i * TopKTraits::kWarps) + 4 * lane;
      scores[i] = load_scores(row, base + at, base + count, aligned);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int32_t strip = first + i * TopKTraits::kWarps;
      const float of_lane[4] = {scores[i].x, scores[i].y, scores[i].z, scores[i].w};
      uint32_t above = 0, equal = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        bool is_above = false, is_equal = false;
        if (kStrip * strip + 4 * lane + c < count) f(of_lane[c], is_above, is_equal);
        above |= static_cast<uint32_t>(is_above) << (4 * lane + c) % 32;
        equal |= static_cast<uint32_t>(is_equal) << (4 * lane + c) % 32;
      }
#pragma unroll
      for (int lanes = 1; lanes < 8; lanes *= 2) {
        above |= __shfl_xor_sync(~0u, above, lanes);
        equal |= __shfl_xor_sync(~0u, equal, lanes);
      }
      const int32_t word = strip * (kStrip / 32) + lane / 8;
      if (lane % 8 == 0 && above != 0) bits.above[word] = above;
      if (lane % 8 == 0 && equal != 0) bits.equal[word] = equal;
    }
  }
}

class TopKWhole {
 public:
  using Traits = TopKTraits;
  static constexpr int kThreads = Traits::kThreads;

  __device__ TopKWhole(TopKSelection& selection, const float* row, int32_t n, int32_t k)
      : selection_(selection), row_(row), n_(n), k_(k) {}

  /// Bins are clear, as are the bits. `taken` may lie in the bins.
  template <int kScores>
  __device__ void run(TopKBits<kScores>& bits, int32_t* taken) {
    const TopKThreshold threshold = find_threshold(
        selection_, [&](auto&& f) { each(f); }, 0, ~0u, static_cast<uint32_t>(k_));
    bits.take(selection_.scan, n_, static_cast<uint32_t>(k_), threshold.ties, taken,
              [&](int32_t base) {
                mark_row(bits, row_, base, n_, [&](float score, bool& is_above, bool& is_equal) {
                  const uint32_t key = order_key(score);
                  is_above = key > threshold.key;
                  is_equal = key == threshold.key;
                });
              });
  }

 private:
  template <typename F>
  __device__ void each(F&& f) const {
    constexpr int kUnroll = 4;
    const bool aligned = is_aligned_to_16(row_);
#pragma unroll 1
    for (int32_t first = 4 * static_cast<int32_t>(threadIdx.x); first < n_;
         first += kUnroll * 4 * kThreads) {
      float4 scores[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
        scores[i] = load_scores(row_, first + 4 * i * kThreads, n_, aligned);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const float of_thread[4] = {scores[i].x, scores[i].y, scores[i].z, scores[i].w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (first + 4 * i * kThreads + c < n_) f(order_key(of_thread[c]));
        }
      }
    }
  }

  TopKSelection& selection_;
  const float* row_;
  int32_t n_, k_;
};

}  // namespace dsv4::nvidia
