// top_k: exact selection of the k best scores of a row.
//
// Problem   n scores (up to 1,000,000) -> k indices (up to 2048): larger score first, then smaller
//           index; NaN counts as -inf, -0 as +0; ascending indices, then -1
// Tiling    a team of 1..16 CTAs takes a row, each a contiguous part; 512 threads a CTA.
//             sample     1024 (long rows 4096) scores, evenly spread -> a cutoff that about 2k
//                        scores of the row pass; every CTA looks at the same ones
//             list       one pass over the part keeps (key, index) of those that pass in shared
//                        memory
//             radix      the first CTA collects the keys: histograms of 11, 11 and 10 bits give the
//                        exact k-th key, and how many of its ties are taken. When the sample was
//                        wrong (fewer than k passed, or too many: ties) the whole team reads its
//                        parts again in every step instead, and adds up its histograms
//             emit       bits of taken scores in windows of 65536, counted and written in order
//           What is computed is integers: neither the cutoff nor the number of CTAs can change it.
// Budget    4 n bytes once: 64 x 65536 scores 16.8 MB = 3.9 us at 4.27 TB/s; the rest is latency:
//           barriers, histograms, and code that is run once (docs/kernels/index_nvidia.md)
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
  static constexpr int kKeys = 8192;         // that one CTA can look at
  static constexpr int kPartEntries = 4096;  // of the list of a part of a team
  static constexpr int kEverything = 4096;   // rows up to this are listed whole
  static constexpr int kLongRow = 65536;
  static constexpr int kRun = 2, kLongRun = 8;  // neighbours that a thread samples
  static constexpr int kWindow = 65536;
  static constexpr int kWindowWords = kWindow / 32;
  static constexpr int kWordsPerThread = kWindowWords / kThreads;
  static_assert(kWindowWords == kBins, "the sample's histogram borrows the window's bits");
  static_assert(kPartEntries >= 2 * kMaxK && kEverything / kThreads >= kLongRun);
};

/// Scores of one part above the k-th key, and equal to it.
struct TopKCounts {
  uint32_t above, equal;
};

template <bool kSingle>
struct TopKStorage {
  static constexpr int kListEntries = kSingle ? TopKTraits::kKeys : TopKTraits::kPartEntries;
  alignas(16) uint32_t bins[3][TopKTraits::kBins];  // of the row, one for every radix step
  alignas(16) uint32_t bits[TopKTraits::kWindowWords];
  alignas(16) uint32_t part_bins[kSingle ? 4 : TopKTraits::kBins];
  uint2 list[kListEntries];                        // (key, index within the part)
  uint32_t keys[kSingle ? 1 : TopKTraits::kKeys];  // of all lists, in the first CTA
  TopKCounts counts[TopKTraits::kMaxTeam];
  alignas(16) uint32_t warp_sums[2][TopKTraits::kWarps];
  uint32_t list_ends[TopKTraits::kMaxTeam];  // of each part's keys among all
  uint32_t part_above, part_equal;
  uint32_t list_size;
  uint32_t threshold, ties;  // from the first CTA
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
  __device__ uint32_t load(const uint32_t* local, uint32_t) const { return *local; }
};

/// Order-preserving: a < b as scores <=> key(a) < key(b). Never 0.
__device__ inline uint32_t order_key(float score) {
  uint32_t bits = __float_as_uint(score);
  if (bits == 0x80000000u) bits = 0;                           // -0 ties with +0
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;  // NaN -> -inf
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

/// The smallest score with a key of at least `key`, for keys from that of -FLT_MAX on.
__device__ inline float score_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

template <typename Team>
class TopKRow {
 public:
  using Traits = TopKTraits;
  using Storage = TopKStorage<Team::kSingle>;
  static constexpr int kThreads = Traits::kThreads;

  /// The part of `team.rank()`: scores [first, first + count) of a row of n.
  __device__ TopKRow(Storage& storage, const float* row, int32_t n, int32_t first, int32_t count,
                     int32_t k, Team team)
      : storage_(storage),
        row_(row),
        scores_(row + first),
        n_(n),
        first_(first),
        count_(count),
        k_(k),
        team_(team) {}

  __device__ void run(int32_t* indices) {
    for (int i = threadIdx.x; i < 3 * Traits::kBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(storage_.bins)[i] = make_uint4(0, 0, 0, 0);
    }
    reinterpret_cast<uint4*>(storage_.bits)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) storage_.part_above = storage_.part_equal = storage_.list_size = 0;
    __syncthreads();
    if (n_ <= Traits::kEverything) {
      list_everything();
    } else {
      list_from(sample_cutoff());
    }
    __syncthreads();
    team_.arrive();
    team_.wait();
    const uint32_t size = collect_sizes();
    if (Team::kSingle || size == 0) {
      find_threshold(team_, [&](auto&& f) { visit(0, count_, f); });
      count_parts();
    } else {
      find_threshold_alone(size);
    }
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

  __device__ void list_everything() {
    for (int32_t i = threadIdx.x; i < count_; i += kThreads) {
      storage_.list[i] = make_uint2(order_key(scores_[i]), static_cast<uint32_t>(i));
    }
    if (threadIdx.x == 0) storage_.list_size = static_cast<uint32_t>(count_);
  }

  __device__ float sample_cutoff() {
    const bool is_long = n_ > Traits::kLongRow;
    const int run = is_long ? Traits::kLongRun : Traits::kRun;
    const int32_t step = n_ / kThreads / Traits::kLongRun * Traits::kLongRun;
    const float* from = row_ + static_cast<int32_t>(threadIdx.x) * step;
    float values[Traits::kLongRun];
#pragma unroll
    for (int i = 0; i < Traits::kLongRun; ++i) values[i] = i < run ? from[i] : 0.0f;
#pragma unroll
    for (int i = 0; i < Traits::kLongRun; ++i) {
      if (i < run) atomicAdd(&storage_.bits[order_key(values[i]) >> Traits::kTopShift], 1u);
    }
    // Twice k of the row, and a margin of a few deviations where that is a handful of samples.
    const uint32_t samples = static_cast<uint32_t>(run) * kThreads;
    const auto wanted = static_cast<uint32_t>(uint64_t{2} * k_ * samples / n_) + 12;
    search(storage_.bits, min(wanted, samples));
    // Not below -FLT_MAX: a comparison of floats would lose NaN, which counts as -inf.
    return score_of(max(storage_.found << Traits::kTopShift, 0x00800000u));
  }

  // Appends scores of up to 32 places of this lane, bit i of `passed` for index_of(i).
  // Called by whole warps.
  template <typename IndexOf>
  __device__ void append(uint32_t passed, IndexOf index_of) {
    if (!__any_sync(~0u, passed != 0)) return;
    const uint32_t lane = threadIdx.x % 32, own = __popc(passed);
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= static_cast<uint32_t>(step)) sum += other;
    }
    uint32_t place = 0;
    if (lane == 31) place = atomicAdd(&storage_.list_size, sum);
    place = __shfl_sync(~0u, place, 31) + sum - own;
    for (; passed != 0; passed &= passed - 1, ++place) {
      const int32_t index = index_of(__ffs(static_cast<int>(passed)) - 1);
      if (place < Storage::kListEntries) {  // once more from the cache: few pass
        storage_.list[place] = make_uint2(order_key(scores_[index]), static_cast<uint32_t>(index));
      }
    }
  }

  __device__ void list_from(float cutoff) {
    const bool aligned = reinterpret_cast<uintptr_t>(scores_) % 16 == 0;
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t num_vectors = aligned ? count_ / 4 : 0;
    // Rounds of 4 vectors a lane; the next round is on its way while one is looked at, and two
    // rounds are appended at once.
    constexpr int kVectors = 4, kStep = kThreads * kVectors;
    float4 values[kVectors];
    const auto load = [&](int32_t base) {
      const auto* vectors = reinterpret_cast<const float4*>(scores_);
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const int32_t i = base + u * kThreads;
        values[u] = i < num_vectors ? __ldg(vectors + i) : make_float4(NAN, NAN, NAN, NAN);
      }
    };
    const auto passed = [&] {
      uint32_t bits = 0;
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        bits |= (values[u].x >= cutoff ? 1u : 0u) << (4 * u);
        bits |= (values[u].y >= cutoff ? 2u : 0u) << (4 * u);
        bits |= (values[u].z >= cutoff ? 4u : 0u) << (4 * u);
        bits |= (values[u].w >= cutoff ? 8u : 0u) << (4 * u);
      }
      return bits;
    };
    load(thread);
    for (int32_t base = thread; base - thread < num_vectors; base += 2 * kStep) {
      uint32_t bits = passed();
      load(base + kStep);
      bits |= passed() << 16;
      load(base + 2 * kStep);
      append(bits, [&](int bit) { return 4 * (base + bit / 4 * kThreads) + bit % 4; });
    }
    constexpr int kScores = 8;
    for (int32_t base = 4 * num_vectors + thread; base - thread < count_;
         base += kThreads * kScores) {
      uint32_t bits = 0;
#pragma unroll
      for (int u = 0; u < kScores; ++u) {
        const int32_t i = base + u * kThreads;
        bits |= (i < count_ && scores_[i] >= cutoff ? 1u : 0u) << u;
      }
      append(bits, [&](int bit) { return base + bit * kThreads; });
    }
  }

  // Where each part's keys lie among all; the number of all, or 0 where the lists are of no use.
  __device__ uint32_t collect_sizes() {
    static_assert(Traits::kMaxTeam <= 32);
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t size = lane < team_.size() ? team_.load(&storage_.list_size, lane) : 0;
    uint32_t end = size;
#pragma unroll
    for (int step = 1; step < Traits::kMaxTeam; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, end, step);
      if (lane >= static_cast<uint32_t>(step)) end += other;
    }
    const uint32_t total = __shfl_sync(~0u, end, Traits::kMaxTeam - 1);
    const bool fits = __all_sync(~0u, size <= Storage::kListEntries);
    if (threadIdx.x < Traits::kMaxTeam) storage_.list_ends[threadIdx.x] = end;
    listed_ = fits && total >= static_cast<uint32_t>(k_) && total <= Traits::kKeys;
    __syncthreads();
    return listed_ ? total : 0;
  }
  // Which part's list the i-th of all keys comes from.
  __device__ uint32_t part_of_key(uint32_t i) const {
    uint32_t part = 0;
    while (storage_.list_ends[part] <= i) ++part;
    return part;
  }

  // ---- the k-th key

  // The first CTA looks at the keys of all lists, and tells the others the k-th one and how many
  // keys of each part are above it and equal to it.
  __device__ void find_threshold_alone(uint32_t size) {
    TopKCounts* counts = storage_.counts;
    if (team_.rank() == 0) {
      if (threadIdx.x < Traits::kMaxTeam) counts[threadIdx.x] = {0, 0};
      constexpr int kBatch = 4;  // remote loads under way at once
      for (uint32_t base = threadIdx.x; base < size; base += kThreads * kBatch) {
        uint32_t keys[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const uint32_t i = base + j * kThreads;
          if (i >= size) continue;
          const uint32_t part = part_of_key(i);
          const uint32_t at = i - (part == 0 ? 0 : storage_.list_ends[part - 1]);
          keys[j] = team_.load(&storage_.list[at].x, part);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (base + j * kThreads < size) storage_.keys[base + j * kThreads] = keys[j];
        }
      }
      __syncthreads();
      find_threshold(SingleCta(), [&](auto&& f) {
        for (uint32_t i = threadIdx.x; i < size; i += kThreads) f(storage_.keys[i], 0);
      });
      for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
        const uint32_t key = storage_.keys[i];
        if (key < threshold_) continue;
        TopKCounts& part = counts[part_of_key(i)];
        atomicAdd(key > threshold_ ? &part.above : &part.equal, 1u);
      }
      __syncthreads();
      static_assert(kThreads == Traits::kMaxTeam * Traits::kMaxTeam * 2);
      const uint32_t rank = threadIdx.x / (2 * Traits::kMaxTeam);
      uint32_t* word = &counts[0].above + threadIdx.x % (2 * Traits::kMaxTeam);
      if (rank > 0 && rank < team_.size()) team_.store(word, rank, *word);
      if (threadIdx.x < team_.size()) {
        team_.store(&storage_.threshold, threadIdx.x, threshold_);
        team_.store(&storage_.ties, threadIdx.x, ties_wanted_);
      }
    }
    team_.arrive();
    team_.wait();
    threshold_ = storage_.threshold;
    ties_wanted_ = storage_.ties;
  }

  // Three histograms; `visit(f)` calls f(key, index) for the keys of this member of `team`.
  template <typename AnyTeam, typename Visit>
  __device__ void find_threshold(AnyTeam team, Visit&& visit) {
    threshold_ = 0;
    ties_wanted_ = static_cast<uint32_t>(k_);
#pragma unroll 1  // code that is run once comes slowly
    for (int step = 0; step < 3; ++step) {
      const int shift = step == 0 ? Traits::kTopShift : step == 1 ? Traits::kMidShift : 0;
      const int bits = (step == 0 ? 32 : step == 1 ? Traits::kTopShift : Traits::kMidShift) - shift;
      uint32_t* row_bins = storage_.bins[step];
      uint32_t* bins = AnyTeam::kSingle ? row_bins : storage_.part_bins;
      if constexpr (!AnyTeam::kSingle) {
        for (int i = threadIdx.x; i < Traits::kBins; i += kThreads) bins[i] = 0;
        __syncthreads();
      }
      const uint32_t prefix = threshold_, mask = (1u << bits) - 1;
      visit([&](uint32_t key, int32_t) {
        if (step > 0 && key >> (shift + bits) != prefix) return;
        atomicAdd(&bins[key >> shift & mask], 1u);
      });
      if constexpr (!AnyTeam::kSingle) {
        __syncthreads();
        for (int i = threadIdx.x; i < Traits::kBins; i += kThreads) {
          if (bins[i] == 0) continue;
          for (uint32_t r = 0; r < team.size(); ++r) team.add(&row_bins[i], r, bins[i]);
        }
        team.arrive();
        team.wait();
      }
      search(row_bins, ties_wanted_);
      threshold_ = prefix << bits | storage_.found;
      ties_wanted_ = storage_.found_rank;
    }
  }

  // The largest bin that has the `rank`-th score from above; found_rank is its rank in the bin.
  // 1 <= rank <= sum of all bins. Begins and ends with a barrier.
  __device__ void search(const uint32_t* bins, uint32_t rank) {
    static_assert(Traits::kBinsPerThread == 4);
    __syncthreads();
    const int last = Traits::kBins - 4 - static_cast<int>(threadIdx.x) * 4;
    const uint4 own = *reinterpret_cast<const uint4*>(bins + last);
    uint32_t total;
    uint32_t before = sum_before(own.x + own.y + own.z + own.w, total);
    const uint32_t counts[4] = {own.w, own.z, own.y, own.x};  // from above
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (before < rank && rank <= before + counts[i]) {
        storage_.found = static_cast<uint32_t>(last + 3 - i);
        storage_.found_rank = rank - before;
      }
      before += counts[i];
    }
    __syncthreads();
  }

  // Sum of `own` over the threads before this one, and over all. Between two calls the sums change
  // places, so that one barrier is enough.
  __device__ uint32_t sum_before(uint32_t own, uint32_t& total) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= static_cast<uint32_t>(step)) sum += other;
    }
    uint32_t* sums = storage_.warp_sums[sum_place_ ^= 1];
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    uint32_t before = sum - own;
    total = 0;
#pragma unroll
    for (uint32_t w = 0; w < Traits::kWarps; ++w) {
      const uint32_t value = sums[w];
      if (w < warp) before += value;
      total += value;
    }
    return before;
  }

  // ---- output

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
    static_assert(Traits::kWordsPerThread == 4);
    reinterpret_cast<uint4*>(storage_.bits)[threadIdx.x] = make_uint4(0, 0, 0, 0);
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
  const float* row_;
  const float* scores_;  // of the part
  int32_t n_, first_, count_;
  int32_t k_;
  Team team_;
  int sum_place_ = 0;
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
  TopKRow<Team> row(storage, args.logits + token * args.logits_stride, n, part.begin,
                    part.end - part.begin, k, team);
  row.run(indices);
}

}  // namespace dsv4::nvidia
