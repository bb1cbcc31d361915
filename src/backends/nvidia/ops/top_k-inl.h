// top_k: exact selection of the k best scores of a row.
//
// Problem   n scores (up to 1,000,000) -> k indices (up to 2048): larger score first, then smaller
//           index; NaN counts as -inf, -0 as +0; ascending indices, then -1
// Tiling    a team of 1..16 CTAs takes a row, each a contiguous part; 512 threads a CTA.
//             sample     4096 scores of the part (512 sectors, evenly spread) -> a cutoff that
//             about
//                        2k scores of the part pass
//             list       one pass over the part keeps (key, index) of those that pass in shared
//                        memory. If at least k did, the row's k-th best cannot lie below the
//                        cutoff, so the list of each part is all that matters. Too few or too many
//                        (ties): the scores are read again in each of the following steps instead
//             radix      histograms of 11, 11 and 10 bits of order-preserving keys, added up over
//                        the team -> the exact k-th key, and how many of its ties are taken
//             emit       bits of taken scores in windows of 65536, counted and written in order
//           What is computed is integers: neither the cutoff nor the number of CTAs can change it.
// Budget    4 n bytes once: 64 x 65536 scores 16.8 MB = 3.9 us at 4.27 TB/s; then about 1.5 us for
//           each of radix step and emit, mostly barriers
// Launch    grid (tokens * team), 512 threads, smem = sizeof(TopKStorage) about 100 KB: 2 CTAs/SM
// Contract  1 <= k <= 2048; end <= k: identity. Logits need 4-byte alignment only (16 is faster)
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
  static constexpr int kBinsPerThread = kBins / kThreads;
  static constexpr int kTopShift = 21;  // 11 upper bits, 11, 10
  static constexpr int kMidShift = 10;
  static constexpr int kListEntries = 8192;
  static constexpr int kSampleRun = 8;  // scores a thread samples: one sector of 32 bytes
  static constexpr int kSamples = kThreads * kSampleRun;
  static constexpr int kWindow = 65536;
  static constexpr int kWindowWords = kWindow / 32;
  static constexpr int kWordsPerThread = kWindowWords / kThreads;
  static_assert(kWindowWords == kBins, "the sample's histogram borrows the window's bits");
  static_assert(kListEntries >= 2 * kMaxK);
};

/// Scores of one part above the k-th key, and equal to it.
struct TopKCounts {
  uint32_t above, equal;
};

template <bool kSingle>
struct TopKStorage {
  alignas(16) uint32_t bins[3][TopKTraits::kBins];  // of the row, one for every radix step
  alignas(16) uint32_t part_bins[kSingle ? 1 : TopKTraits::kBins];
  alignas(16) uint32_t bits[TopKTraits::kWindowWords];
  uint2 list[TopKTraits::kListEntries];  // (key, index within the part)
  TopKCounts counts[TopKTraits::kMaxTeam];
  uint32_t warp_sums[TopKTraits::kWarps];
  uint32_t part_above, part_equal;
  uint32_t list_size;
  uint32_t found, found_rank;
};
static_assert(sizeof(TopKStorage<false>) <= 113 * 1024, "two CTAs on an SM of sm_90");
static_assert(sizeof(TopKStorage<true>) <= 99 * 1024, "all that a CTA of sm_86 or sm_120 gets");

/// A team of one.
struct SingleCta {
  static constexpr bool kSingle = true;
  __device__ uint32_t rank() const { return 0; }
  __device__ uint32_t size() const { return 1; }
  __device__ void arrive() const {}
  __device__ void wait() const {}
  __device__ void add(uint32_t* local, uint32_t, uint32_t value) const { atomicAdd(local, value); }
  __device__ void store(uint32_t* local, uint32_t, uint32_t value) const { *local = value; }
};

/// Order-preserving: a < b as scores <=> key(a) < key(b). Never 0.
__device__ inline uint32_t order_key(float score) {
  uint32_t bits = __float_as_uint(score);
  if (bits == 0x80000000u) bits = 0;                           // -0 ties with +0
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;  // NaN -> -inf
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

template <typename Team>
class TopKRow {
 public:
  using Traits = TopKTraits;
  using Storage = TopKStorage<Team::kSingle>;
  static constexpr int kThreads = Traits::kThreads;

  __device__ TopKRow(Storage& storage, const float* scores, int32_t count, int32_t first, int32_t k,
                     Team team)
      : storage_(storage), scores_(scores), count_(count), first_(first), k_(k), team_(team) {}

  __device__ void run(int32_t* indices) {
    for (int i = threadIdx.x; i < 3 * Traits::kBins; i += kThreads) storage_.bins[0][i] = 0;
    if (threadIdx.x == 0) storage_.part_above = storage_.part_equal = storage_.list_size = 0;
    __syncthreads();
    team_.arrive();  // others may add to the bins now
    make_list();
    team_.wait();
    find_threshold();
    emit(indices);
  }

 private:
  // f(key, index) for every score of the part that may matter, with begin <= index < end.
  template <typename F>
  __device__ void visit(int32_t begin, int32_t end, F&& f) const {
    if (listed_) {
      const int32_t size = static_cast<int32_t>(storage_.list_size);
      for (int32_t i = threadIdx.x; i < size; i += kThreads) {
        const uint2 entry = storage_.list[i];
        const auto index = static_cast<int32_t>(entry.y);
        if (index >= begin && index < end) f(entry.x, index);
      }
    } else {
      for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i < end; i += kThreads) {
        f(order_key(scores_[i]), i);
      }
    }
  }

  // ---- the list

  __device__ void make_list() {
    if (count_ <= Traits::kListEntries) {
#pragma unroll 4
      for (int32_t i = threadIdx.x; i < count_; i += kThreads) {
        storage_.list[i] = make_uint2(order_key(scores_[i]), static_cast<uint32_t>(i));
      }
      if (threadIdx.x == 0) storage_.list_size = static_cast<uint32_t>(count_);
      listed_ = true;
      __syncthreads();
      return;
    }
    const uint32_t cutoff = sample_cutoff();
    if (reinterpret_cast<uintptr_t>(scores_) % 16 == 0) {
      keep_vectors(cutoff);
    } else {
      keep_scores(cutoff);
    }
    __syncthreads();
    const uint32_t size = storage_.list_size;
    listed_ = size >= static_cast<uint32_t>(k_) && size <= Traits::kListEntries;
  }

  __device__ uint32_t sample_cutoff() {
    for (int i = threadIdx.x; i < Traits::kBins; i += kThreads) storage_.bits[i] = 0;
    __syncthreads();
    const int32_t step = count_ / kThreads / Traits::kSampleRun * Traits::kSampleRun;
    const float* run = scores_ + static_cast<int32_t>(threadIdx.x) * step;
    float values[Traits::kSampleRun];
#pragma unroll
    for (int i = 0; i < Traits::kSampleRun; ++i) values[i] = run[i];
#pragma unroll
    for (int i = 0; i < Traits::kSampleRun; ++i) {
      atomicAdd(&storage_.bits[order_key(values[i]) >> Traits::kTopShift], 1u);
    }
    // Twice k of the part, and a margin of a few deviations where that is a handful of samples.
    const auto rank = static_cast<uint32_t>(2ll * k_ * Traits::kSamples / count_) + 12;
    search(storage_.bits, rank);
    return max(storage_.found << Traits::kTopShift, 1u);
  }

  // Appends the scores of a warp that pass. Called by whole warps.
  template <int kCount>
  __device__ void append(const uint32_t (&keys)[kCount], const int32_t (&index)[kCount],
                         uint32_t cutoff) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) any |= keys[i] >= cutoff;
    if (!__any_sync(~0u, any)) return;
    const uint32_t lane = threadIdx.x % 32, below = (1u << lane) - 1;
    uint32_t passed[kCount], total = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      passed[i] = __ballot_sync(~0u, keys[i] >= cutoff);
      total += __popc(passed[i]);
    }
    uint32_t place = 0;
    if (lane == 0) place = atomicAdd(&storage_.list_size, total);
    place = __shfl_sync(~0u, place, 0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t at = place + __popc(passed[i] & below);
      if (keys[i] >= cutoff && at < Traits::kListEntries) {
        storage_.list[at] = make_uint2(keys[i], static_cast<uint32_t>(index[i]));
      }
      place += __popc(passed[i]);
    }
  }

  __device__ void keep_vectors(uint32_t cutoff) {
    constexpr int kUnroll = 4;
    const auto* vectors = reinterpret_cast<const float4*>(scores_);
    const int32_t num_vectors = count_ / 4;
    for (int32_t base = 0; base < num_vectors; base += kThreads * kUnroll) {
      float4 values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = base + u * kThreads + static_cast<int32_t>(threadIdx.x);
        if (i < num_vectors) values[u] = vectors[i];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = base + u * kThreads + static_cast<int32_t>(threadIdx.x);
        const bool valid = i < num_vectors;
        const float4 v = values[u];
        const uint32_t keys[4] = {valid ? order_key(v.x) : 0, valid ? order_key(v.y) : 0,
                                  valid ? order_key(v.z) : 0, valid ? order_key(v.w) : 0};
        append<4>(keys, {4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3}, cutoff);
      }
    }
    keep_rest(4 * num_vectors, cutoff);
  }

  __device__ void keep_scores(uint32_t cutoff) {
    constexpr int kUnroll = 8;
    const int32_t rest = count_ / (kThreads * kUnroll) * (kThreads * kUnroll);
    for (int32_t base = 0; base < rest; base += kThreads * kUnroll) {
      uint32_t keys[kUnroll];
      int32_t index[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        index[u] = base + u * kThreads + static_cast<int32_t>(threadIdx.x);
        keys[u] = order_key(scores_[index[u]]);
      }
      append<kUnroll>(keys, index, cutoff);
    }
    keep_rest(rest, cutoff);
  }

  __device__ void keep_rest(int32_t begin, uint32_t cutoff) {
    for (; begin < count_; begin += kThreads) {
      const int32_t i = begin + static_cast<int32_t>(threadIdx.x);
      const uint32_t keys[1] = {i < count_ ? order_key(scores_[i]) : 0};
      append<1>(keys, {i}, cutoff);
    }
  }

  // ---- the k-th key

  __device__ void find_threshold() {
    threshold_ = 0;
    ties_wanted_ = static_cast<uint32_t>(k_);
    radix_step<Traits::kTopShift, 32 - Traits::kTopShift>(0);
    radix_step<Traits::kMidShift, Traits::kTopShift - Traits::kMidShift>(1);
    radix_step<0, Traits::kMidShift>(2);
  }

  // Finds the next kBits of the k-th key.
  template <int kShift, int kBits>
  __device__ void radix_step(int step) {
    uint32_t* row_bins = storage_.bins[step];
    uint32_t* bins = Team::kSingle ? row_bins : storage_.part_bins;
    if constexpr (!Team::kSingle) {
      for (int i = threadIdx.x; i < Traits::kBins; i += kThreads) bins[i] = 0;
      __syncthreads();
    }
    const uint32_t prefix = threshold_;
    visit(0, count_, [&](uint32_t key, int32_t) {
      if constexpr (kShift + kBits < 32) {
        if (key >> (kShift + kBits) != prefix) return;
      }
      atomicAdd(&bins[key >> kShift & ((1u << kBits) - 1)], 1u);
    });
    __syncthreads();
    if constexpr (!Team::kSingle) {
      // Few bins are not empty: scores of a part lie close together.
      for (int i = threadIdx.x; i < Traits::kBins; i += kThreads) {
        if (bins[i] == 0) continue;
        for (uint32_t r = 0; r < team_.size(); ++r) team_.add(&row_bins[i], r, bins[i]);
      }
      team_.arrive();
      team_.wait();
    }
    search(row_bins, ties_wanted_);
    threshold_ = prefix << kBits | storage_.found;
    ties_wanted_ = storage_.found_rank;
  }

  // The largest bin that has the `rank`-th score from above; found_rank is its rank in the bin.
  // 1 <= rank <= sum of all bins. Ends with a barrier.
  __device__ void search(const uint32_t* bins, uint32_t rank) {
    __syncthreads();
    const int last = Traits::kBins - 1 - static_cast<int>(threadIdx.x) * Traits::kBinsPerThread;
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < Traits::kBinsPerThread; ++i) own += bins[last - i];
    uint32_t total;
    uint32_t before = sum_before(own, total);
    if (before < rank && rank <= before + own) {
      int bin = last;
      for (; before + bins[bin] < rank; --bin) before += bins[bin];
      storage_.found = static_cast<uint32_t>(bin);
      storage_.found_rank = rank - before;
    }
    __syncthreads();
  }

  // Sum of `own` over the threads before this one, and over all.
  __device__ uint32_t sum_before(uint32_t own, uint32_t& total) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= static_cast<uint32_t>(step)) sum += other;
    }
    __syncthreads();
    if (lane == 31) storage_.warp_sums[warp] = sum;
    __syncthreads();
    uint32_t before = sum - own;
    total = 0;
#pragma unroll
    for (uint32_t w = 0; w < Traits::kWarps; ++w) {
      const uint32_t value = storage_.warp_sums[w];
      if (w < warp) before += value;
      total += value;
    }
    return before;
  }

  // ---- output

  __device__ void emit(int32_t* indices) {
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
    } else if (storage_.part_equal > ties_left) {
      ties_end = find_ties_end(ties_left);
    }

    uint32_t place = above_before + ties_before;
    for (int32_t begin = 0; begin < count_; begin += Traits::kWindow) {
      mark(begin, [&](uint32_t key, int32_t index) {
        return key > threshold || (key == threshold && index < ties_end);
      });
      uint32_t own = 0, total;
#pragma unroll
      for (int i = 0; i < Traits::kWordsPerThread; ++i) own += __popc(word(i));
      uint32_t at = place + sum_before(own, total);
      for (int i = 0; i < Traits::kWordsPerThread; ++i) {
        const int32_t base =
            first_ + begin + 32 * (static_cast<int32_t>(threadIdx.x) * Traits::kWordsPerThread + i);
        for (uint32_t bits = word(i); bits != 0; bits &= bits - 1) {
          indices[at++] = base + __ffs(static_cast<int>(bits)) - 1;
        }
      }
      place += total;
    }
  }

  // One past the index of the `rank`-th score that equals the threshold.
  __device__ int32_t find_ties_end(uint32_t rank) {
    for (int32_t begin = 0; begin < count_; begin += Traits::kWindow) {
      mark(begin, [&](uint32_t key, int32_t) { return key == threshold_; });
      uint32_t own = 0, total;
#pragma unroll
      for (int i = 0; i < Traits::kWordsPerThread; ++i) own += __popc(word(i));
      uint32_t before = sum_before(own, total);
      if (rank > total) {
        rank -= total;
        continue;
      }
      if (before < rank && rank <= before + own) {
        int i = 0;
        for (; before + __popc(word(i)) < rank; ++i) before += __popc(word(i));
        uint32_t bits = word(i);
        for (; before + 1 < rank; ++before) bits &= bits - 1;
        storage_.found = static_cast<uint32_t>(
            begin + 32 * (static_cast<int32_t>(threadIdx.x) * Traits::kWordsPerThread + i) +
            __ffs(static_cast<int>(bits)));
      }
      __syncthreads();
      return static_cast<int32_t>(storage_.found);
    }
    return count_;
  }

  // Sets the bits of the window's scores that `chosen` names. Begins and ends with a barrier.
  template <typename F>
  __device__ void mark(int32_t begin, F&& chosen) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Traits::kWordsPerThread; ++i) word(i) = 0;
    __syncthreads();
    visit(begin, min(count_, begin + Traits::kWindow), [&](uint32_t key, int32_t index) {
      if (!chosen(key, index)) return;
      atomicOr(&storage_.bits[(index - begin) / 32], 1u << ((index - begin) % 32));
    });
    __syncthreads();
  }
  __device__ uint32_t& word(int i) {
    return storage_.bits[threadIdx.x * Traits::kWordsPerThread + static_cast<uint32_t>(i)];
  }

  Storage& storage_;
  const float* scores_;  // of the part
  int32_t count_, first_;
  int32_t k_;
  Team team_;
  bool listed_ = false;
  uint32_t threshold_ = 0, ties_wanted_ = 0;
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

template <typename Team>
__device__ void top_k_row(TopKStorage<Team::kSingle>& storage, const TopKArgs& args, int64_t token,
                          Team team) {
  const int32_t n = min(max(args.end[token], 0), args.width), k = args.k;
  int32_t* indices = args.indices + token * args.indices_stride;
  if (team.rank() == 0) {
    if (threadIdx.x == 0) args.length[token] = min(n, k);
    for (int32_t i = threadIdx.x; i < k; i += TopKTraits::kThreads) {
      if (n <= k) indices[i] = i < n ? i : -1;
    }
  }
  if (n <= k) return;  // the whole team
  const TopKPart part = part_of(n, team.rank(), team.size());
  TopKRow<Team> row(storage, args.logits + token * args.logits_stride + part.begin,
                    part.end - part.begin, part.begin, k, team);
  row.run(indices);
}

}  // namespace dsv4::nvidia
