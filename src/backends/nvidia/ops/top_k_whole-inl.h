// top_k of a row whose sample was wrong: three histograms of all keys (11, 11 and 10 bits), added
// up over the team by remote atomics, give the exact k-th key; bits of taken scores in windows of
// 65536 give ascending output. The row is read in every step, from L2.
#pragma once
#include "backends/nvidia/ops/top_k_scan-inl.h"

namespace dsv4::nvidia {

struct TopKWholeStorage {
  static constexpr int kWindow = 65536;
  static constexpr int kWindowWords = kWindow / 32;
  TopKScan scan;
  alignas(16) uint32_t bins[3][TopKTraits::kBins];  // of the row, one for every step
  alignas(16) uint32_t part_bins[TopKTraits::kBins];
  alignas(16) uint32_t bits[kWindowWords];
  TopKCounts counts[TopKTraits::kMaxTeam];
  uint32_t part_above, part_equal;
  int32_t ties_end;
};

template <typename Team>
class TopKWhole {
 public:
  using Traits = TopKTraits;
  using Storage = TopKWholeStorage;
  static constexpr int kThreads = Traits::kThreads;

  /// The part of `team.rank()`, whose first score `scores` points at.
  __device__ TopKWhole(Storage& storage, const float* scores, TopKPart part, int32_t k, Team team)
      : storage_(storage),
        scores_(scores),
        first_(part.begin),
        count_(part.end - part.begin),
        k_(k),
        team_(team) {}

  __device__ void run(int32_t* indices) {
    for (int i = threadIdx.x; i < 3 * Traits::kBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(storage_.bins)[i] = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x == 0) storage_.part_above = storage_.part_equal = 0;
    __syncthreads();
    team_.arrive();
    team_.wait();
    find_threshold();
    count_parts();
    emit(indices);
  }

 private:
  // f(key, index) for the scores of the part with begin <= index < end.
  template <typename F>
  __device__ void visit(int32_t begin, int32_t end, F&& f) const {
    for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i < end; i += kThreads) {
      f(order_key(scores_[i]), i);
    }
  }

  __device__ void find_threshold() {
    threshold_ = 0;
    ties_wanted_ = static_cast<uint32_t>(k_);
#pragma unroll 1
    for (int step = 0; step < 3; ++step) {
      const int shift = step == 0 ? 21 : step == 1 ? 10 : 0;
      const int bits = step == 2 ? 10 : 11;
      uint32_t* row_bins = storage_.bins[step];
      uint32_t* bins = storage_.part_bins;
      for (int i = threadIdx.x; i < Traits::kBins; i += kThreads) bins[i] = 0;
      __syncthreads();
      const uint32_t prefix = threshold_, mask = (1u << bits) - 1;
      visit(0, count_, [&](uint32_t key, int32_t) {
        if (step > 0 && key >> (shift + bits) != prefix) return;
        atomicAdd(&bins[key >> shift & mask], 1u);
      });
      __syncthreads();
      for (int i = threadIdx.x; i < Traits::kBins; i += kThreads) {
        if (bins[i] == 0) continue;
        for (uint32_t r = 0; r < team_.size(); ++r) team_.add(&row_bins[i], r, bins[i]);
      }
      team_.arrive();
      team_.wait();
      const TopKFound found = storage_.scan.search(row_bins, ties_wanted_);
      threshold_ = prefix << bits | found.bin;
      ties_wanted_ = found.rank;
    }
  }

  // How many keys of each part are above the threshold and equal to it, known to all parts.
  __device__ void count_parts() {
    const uint32_t threshold = threshold_;
    uint32_t above = 0, equal = 0;
    visit(0, count_, [&](uint32_t key, int32_t) {
      above += key > threshold;
      equal += key == threshold;
    });
    above = __reduce_add_sync(~0u, above);
    equal = __reduce_add_sync(~0u, equal);
    if (threadIdx.x % 32 == 0) {
      atomicAdd(&storage_.part_above, above);
      atomicAdd(&storage_.part_equal, equal);
    }
    __syncthreads();
    if (threadIdx.x < team_.size()) {
      TopKCounts& place = storage_.counts[team_.rank()];
      team_.store(&place.above, threadIdx.x, storage_.part_above);
      team_.store(&place.equal, threadIdx.x, storage_.part_equal);
    }
    __syncthreads();
    team_.arrive();
    team_.wait();
  }

  __device__ void emit(int32_t* indices) {
    const uint32_t threshold = threshold_;
    // Ties go to the smaller indices: parts before this one take theirs first.
    uint32_t above_before = 0, equal_before = 0;
    for (uint32_t r = 0; r < team_.rank(); ++r) {
      above_before += storage_.counts[r].above;
      equal_before += storage_.counts[r].equal;
    }
    const uint32_t ties_before = min(equal_before, ties_wanted_);
    const uint32_t ties_left = ties_wanted_ - ties_before;
    int32_t ties_end = count_;  // ties from here on are not taken
    if (ties_left == 0) {
      ties_end = 0;
    } else if (storage_.counts[team_.rank()].equal > ties_left) {
      ties_end = find_ties_end(ties_left);
    }

    uint32_t place = above_before + ties_before;
    for (int32_t begin = 0; begin < count_; begin += Storage::kWindow) {
      mark(begin, [&](uint32_t key, int32_t index) {
        return key > threshold || (key == threshold && index < ties_end);
      });
      uint32_t total;
      uint32_t at = place + bits_before(total);
      for (int i = 0; i < kWordsPerThread; ++i) {
        const int32_t base =
            first_ + begin + 32 * (static_cast<int32_t>(threadIdx.x) * kWordsPerThread + i);
        for (uint32_t bits = word(i); bits != 0; bits &= bits - 1) {
          indices[at++] = base + __ffs(static_cast<int>(bits)) - 1;
        }
      }
      place += total;
    }
  }

  // One past the index of the `rank`-th score that equals the threshold.
  __device__ int32_t find_ties_end(uint32_t rank) {
    for (int32_t begin = 0; begin < count_; begin += Storage::kWindow) {
      mark(begin, [&](uint32_t key, int32_t) { return key == threshold_; });
      uint32_t total;
      uint32_t before = bits_before(total), own = 0;
      for (int i = 0; i < kWordsPerThread; ++i) own += __popc(word(i));
      if (rank > total) {
        rank -= total;
        continue;
      }
      if (before < rank && rank <= before + own) {
        int i = 0;
        for (; before + __popc(word(i)) < rank; ++i) before += __popc(word(i));
        uint32_t bits = word(i);
        for (; before + 1 < rank; ++before) bits &= bits - 1;
        storage_.ties_end = begin + 32 * (static_cast<int32_t>(threadIdx.x) * kWordsPerThread + i) +
                            __ffs(static_cast<int>(bits));
      }
      __syncthreads();
      return storage_.ties_end;
    }
    return count_;
  }

  // Sets the bits of the window's scores that `chosen` names. Begins and ends with a barrier.
  template <typename F>
  __device__ void mark(int32_t begin, F&& chosen) {
    __syncthreads();
    static_assert(kWordsPerThread == 4);
    reinterpret_cast<uint4*>(storage_.bits)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    visit(begin, min(count_, begin + Storage::kWindow), [&](uint32_t key, int32_t index) {
      if (!chosen(key, index)) return;
      atomicOr(&storage_.bits[(index - begin) / 32], 1u << ((index - begin) % 32));
    });
    __syncthreads();
  }
  static constexpr int kWordsPerThread = Storage::kWindowWords / kThreads;
  __device__ uint32_t word(int i) const {
    return storage_.bits[threadIdx.x * kWordsPerThread + static_cast<uint32_t>(i)];
  }
  // Bits of the window before this thread's, and all.
  __device__ uint32_t bits_before(uint32_t& total) {
    uint32_t own = 0;
    for (int i = 0; i < kWordsPerThread; ++i) own += __popc(word(i));
    return storage_.scan.sum_before(own, total, turn_ ^= 1);
  }

  Storage& storage_;
  const float* scores_;  // of the part
  int32_t first_, count_;
  int32_t k_;
  Team team_;
  uint32_t threshold_ = 0, ties_wanted_ = 0, turn_ = 0;
};

}  // namespace dsv4::nvidia
