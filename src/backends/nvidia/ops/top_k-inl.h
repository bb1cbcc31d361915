// top_k: exact selection of the k best scores of a row.
//
// Problem   n scores (up to 1,000,000) -> k indices (up to 2048): larger score first, then smaller
//           index; NaN counts as -inf, -0 as +0; ascending indices, then -1
// Tiling    a team of 1..16 CTAs takes a row, each a contiguous part, each of its 16 warps a
//           contiguous piece of the part:
//             sample     maxima of 64 groups of 8 to 128 scores, spread over the row; one of them
//                        is the cutoff, which some 2k scores of the row pass
//             list       one pass over the piece keeps (key, index) of those that pass, in order
//             select     the first CTA takes all lists, warp by warp, in order: a histogram between
//                        the cutoff and the largest maximum finds the bin of the k-th key, and the
//                        few keys in it are ranked by comparing all with all. Crowded bins are cut
//                        up again
//             emit       lists are in order: places are counts of what is taken before
//           When the sample was wrong (fewer than k passed, or too many), the team reads the row
//           again and again instead (top_k_whole-inl.h). What is computed is integers: neither the
//           cutoff nor the number of CTAs can change it
// Budget    4 n bytes once: 64 x 65536 scores 16.8 MB = 3.9 us at 4.27 TB/s; the rest is latency:
//           two trips to memory, a dozen barriers, two of the team (docs/kernels/index_nvidia.md)
// Launch    grid (tokens * team), 512 threads, smem = sizeof(TopKStorage) 74 or 106 KB: 2 CTAs/SM
// Contract  1 <= k <= 2048; end <= k: identity. Logits need 4-byte alignment only (16 is faster)
#pragma once
#include <cstdint>

#include "backends/nvidia/ops/top_k.h"
#include "backends/nvidia/ops/top_k_whole-inl.h"

namespace dsv4::nvidia {

template <bool kSingle>
struct TopKLists {
  using Traits = TopKTraits;
  static constexpr int kWarpEntries = kSingle ? 512 : 256;
  TopKScan scan;
  alignas(16) uint32_t bins[Traits::kBins];
  uint2 list[Traits::kWarps][kWarpEntries];  // (key, index in the row) of a warp's piece
  uint2 all[kSingle ? 1 : Traits::kKeys];    // in the first CTA: what the whole row lists
  uint32_t own_sizes[Traits::kWarps];        // of this part's lists; may be more than they hold
  uint32_t sizes[Traits::kMaxTeam * Traits::kWarps];  // of all parts
  alignas(16) float maxima[Traits::kGroups];
  float cutoff, largest;
  uint32_t few_size;
  uint32_t few[Traits::kFewKeys];
  TopKCounts counts[Traits::kWarps];
};

template <bool kSingle>
union TopKStorage {
  TopKLists<kSingle> lists;
  TopKWholeStorage whole;
};
static_assert(sizeof(TopKStorage<false>) <= 113 * 1024, "two CTAs on an SM of sm_90");
static_assert(sizeof(TopKStorage<true>) <= 75 * 1024, "three of them; sm_86 and sm_120 allow 99");

template <typename Team>
class TopKRow {
 public:
  using Traits = TopKTraits;
  using Storage = TopKLists<Team::kSingle>;
  static constexpr int kThreads = Traits::kThreads;

  /// The part of `team.rank()`: scores [part.begin, part.end) of a row of n.
  __device__ TopKRow(Storage& storage, const float* row, int32_t n, TopKPart part, int32_t k,
                     Team team)
      : storage_(storage), row_(row), n_(n), k_(k), team_(team) {
    const int32_t step =
        (part.end - part.begin + 4 * Traits::kWarps - 1) / (4 * Traits::kWarps) * 4;
    begin_ = min(part.end, part.begin + static_cast<int32_t>(warp_) * step);
    end_ = min(part.end, begin_ + step);
    aligned_ = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    // Short rows are listed whole.
    everything_ = n <= Traits::kEverything || (n <= Traits::kKeys && n <= 4 * k);
  }

  /// @return false where the lists are of no use, in all CTAs of the team.
  __device__ bool run(int32_t* indices) {
    float4 values[kVectors];
    load(values, begin_);  // on its way while the sample is taken
    static_assert(Traits::kBins == 4 * kThreads);
    reinterpret_cast<uint4*>(storage_.bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) storage_.few_size = 0;
    if (!everything_) sample();
    list(values);
    __syncthreads();
    if (threadIdx.x < Traits::kWarps * team_.size()) {  // sizes of this part to everyone
      uint32_t* to = &storage_.sizes[team_.rank() * Traits::kWarps + threadIdx.x % Traits::kWarps];
      team_.store(to, threadIdx.x / Traits::kWarps,
                  storage_.own_sizes[threadIdx.x % Traits::kWarps]);
    }
    team_.arrive();
    team_.wait();
    if (Team::kSingle) __syncthreads();
    const bool listed = collect();
    if (!Team::kSingle) {
      team_.arrive();  // nobody leaves before its lists have been taken
      if (team_.rank() != 0 || !listed) team_.wait();
    }
    if (!listed) return false;
    if (team_.rank() == 0) {
      select();
      emit(indices);
      if (!Team::kSingle) team_.wait();
    }
    return true;
  }

 private:
  static constexpr int kVectors = 4;
  static constexpr int32_t kRound = 4 * 32 * kVectors;  // scores of a warp

  // ---- the cutoff

  __device__ void sample() {
    constexpr int kGroupLanes = kThreads / Traits::kGroups;
    // Groups take turns over the row: each one has seen all of it.
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t group = thread / kGroupLanes, member = thread % kGroupLanes;
    const int32_t step = n_ / kThreads;
    const int32_t run = max(1, min(min(step, Traits::kMaxRun), n_ / (4 * kGroupLanes * k_)));
    const float* from = row_ + (member * Traits::kGroups + group) * step;
    float samples[Traits::kMaxRun];
#pragma unroll
    for (int i = 0; i < Traits::kMaxRun; ++i) samples[i] = i < run ? __ldg(from + i) : -INFINITY;
    // Not below -FLT_MAX, and no NaN: what counts as -inf passes no cutoff.
    float largest = -3.402823466e38f;
#pragma unroll
    for (int i = 0; i < Traits::kMaxRun; ++i) largest = fmaxf(largest, samples[i]);
#pragma unroll
    for (int lanes = 1; lanes < kGroupLanes; lanes *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    }
    if (member == 0) storage_.maxima[group] = largest;
    __syncthreads();
    // How many maxima are below this group's; 8 for each lane.
    static_assert(kGroupLanes == 8 && Traits::kGroups == 64);
    const float4* others = reinterpret_cast<const float4*>(storage_.maxima) + 2 * member;
    int rank = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 other = others[i];
      const int32_t first = 8 * member + 4 * i;
      rank += other.x < largest || (other.x == largest && first < group);
      rank += other.y < largest || (other.y == largest && first + 1 < group);
      rank += other.z < largest || (other.z == largest && first + 2 < group);
      rank += other.w < largest || (other.w == largest && first + 3 < group);
    }
#pragma unroll
    for (int lanes = 1; lanes < kGroupLanes; lanes *= 2) rank += __shfl_xor_sync(~0u, rank, lanes);
    // A group's maximum is below the k-th score with probability p: the cutoff is the maximum that
    // is 4.5 deviations less than the mean number of those.
    const float p = __expf(-static_cast<float>(run * kGroupLanes) * static_cast<float>(k_) /
                           static_cast<float>(n_));
    const float mean = Traits::kGroups * p;
    const int wanted = max(0, static_cast<int>(mean - 4.5f * __fsqrt_rn(mean * (1.0f - p))));
    if (member == 0 && rank == wanted) storage_.cutoff = largest;
    if (member == 0 && rank == Traits::kGroups - 1) storage_.largest = largest;
    __syncthreads();
  }

  // ---- the lists

  // Scores [at, at + 4) of lane and vector u, at = begin + 4 (32 u + lane); NaN past the end.
  __device__ void load(float4 (&values)[kVectors], int32_t begin) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int32_t at = begin + 4 * (32 * u + static_cast<int32_t>(lane_));
      values[u] = make_float4(NAN, NAN, NAN, NAN);
      if (aligned_ && at + 4 <= end_) {
        values[u] = __ldg(reinterpret_cast<const float4*>(row_ + at));
      } else if (at < end_) {
        values[u].x = __ldg(row_ + at);
        if (at + 1 < end_) values[u].y = __ldg(row_ + at + 1);
        if (at + 2 < end_) values[u].z = __ldg(row_ + at + 2);
        if (at + 3 < end_) values[u].w = __ldg(row_ + at + 3);
      }
    }
  }

  __device__ void list(float4 (&values)[kVectors]) {
    const float cutoff = everything_ ? 0.0f : storage_.cutoff;
    uint32_t size = 0;
#pragma unroll 1
    for (int32_t begin = begin_; begin < end_; begin += kRound) {
      float4 next[kVectors];
      load(next, begin + kRound);
      uint32_t passed = 0;  // bit 4 u + c: component c of vector u
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        uint32_t bits = (values[u].x >= cutoff ? 1u : 0u) | (values[u].y >= cutoff ? 2u : 0u) |
                        (values[u].z >= cutoff ? 4u : 0u) | (values[u].w >= cutoff ? 8u : 0u);
        if (everything_) {
          const int32_t left = end_ - (begin + 4 * (32 * u + static_cast<int32_t>(lane_)));
          bits = left >= 4 ? 15u : left > 0 ? (1u << left) - 1 : 0u;
        }
        passed |= bits << (4 * u);
      }
      if (__any_sync(~0u, passed != 0)) append(values, begin, passed, size);
#pragma unroll
      for (int u = 0; u < kVectors; ++u) values[u] = next[u];
    }
    if (lane_ == 0) storage_.own_sizes[warp_] = size;
  }

  // Vector by vector, in them lane by lane.
  __device__ void append(const float4 (&values)[kVectors], int32_t begin, uint32_t passed,
                         uint32_t& size) {
    uint32_t own = 0;  // a byte for every vector: at most 128
#pragma unroll
    for (int u = 0; u < kVectors; ++u) own |= __popc(passed >> (4 * u) & 15u) << (8 * u);
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane_ >= static_cast<uint32_t>(step)) sum += other;
    }
    const uint32_t total = __shfl_sync(~0u, sum, 31), before = sum - own;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      uint32_t place = size + (before >> (8 * u) & 255u);
      const int32_t at = begin + 4 * (32 * u + static_cast<int32_t>(lane_));
      for (uint32_t bits = passed >> (4 * u) & 15u; bits != 0; bits &= bits - 1, ++place) {
        const int c = __ffs(static_cast<int>(bits)) - 1;
        const float score = c == 0   ? values[u].x
                            : c == 1 ? values[u].y
                            : c == 2 ? values[u].z
                                     : values[u].w;
        if (place < Storage::kWarpEntries)
          storage_.list[warp_][place] = make_uint2(order_key(score), static_cast<uint32_t>(at + c));
      }
      size += total >> (8 * u) & 255u;
    }
  }

  // Of lists [warp * team, warp * team + team) the first CTA's warps make one each, in order.
  // @return whether the lists are of use.
  __device__ bool collect() {
    const uint32_t team = team_.size(), lists = Traits::kWarps * team;
    const uint32_t per_lane = (lists + 31) / 32;
    uint32_t own = 0, most = 0;
    for (uint32_t i = lane_ * per_lane; i < min(lists, (lane_ + 1) * per_lane); ++i) {
      own += storage_.sizes[i];
      most = max(most, storage_.sizes[i]);
    }
    const uint32_t end = sum_up_to(own);
    const uint32_t total = __shfl_sync(~0u, end, 31);
    if (!__all_sync(~0u, most <= Storage::kWarpEntries) || total < static_cast<uint32_t>(k_) ||
        total > Traits::kKeys) {
      return false;
    }
    if constexpr (Team::kSingle) {
      entries_ = storage_.list[warp_];
      size_ = storage_.sizes[warp_];
    } else {
      if (team_.rank() != 0) return true;
      const uint32_t base = __shfl_sync(~0u, end - own, static_cast<int>(warp_ * team / per_lane));
      const uint32_t first = warp_ * team;
      const uint32_t list_end = sum_up_to(lane_ < team ? storage_.sizes[first + lane_] : 0);
      entries_ = storage_.all + base;
      size_ = __shfl_sync(~0u, list_end, 31);
      constexpr int kBatch = 4;  // remote loads under way at once
#pragma unroll 1
      for (uint32_t begin = 0; begin < size_; begin += 32 * kBatch) {
        uint2 batch[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const uint32_t i = begin + 32 * j + lane_;
          uint32_t list = 0, before = 0;  // the last one that ends after i; halving
#pragma unroll
          for (uint32_t step = Traits::kMaxTeam / 2; step > 0; step /= 2) {
            const uint32_t ends = __shfl_sync(~0u, list_end, static_cast<int>(list + step - 1));
            if (ends <= i) list += step, before = ends;
          }
          if (i >= size_) continue;
          const uint32_t source = first + list;
          batch[j] = team_.load(&storage_.list[source % Traits::kWarps][i - before],
                                source / Traits::kWarps);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const uint32_t i = begin + 32 * j + lane_;
          if (i < size_) entries_[i] = batch[j];
        }
      }
      __syncwarp();
    }
    return true;
  }
  // Over the lanes of the warp up to this one.
  __device__ uint32_t sum_up_to(uint32_t value) const {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, value, step);
      if (lane_ >= static_cast<uint32_t>(step)) value += other;
    }
    return value;
  }

  // ---- the k-th key

  // Keys between `low` and `high`, of which `rank` are wanted, in bins of 2^shift; what is above
  // the last bin falls into it.
  __device__ void select() {
    uint32_t low = everything_ ? 0 : order_key(storage_.cutoff), high = ~0u;
    uint32_t width = (everything_ ? high : order_key(storage_.largest)) - low;
    uint32_t rank = static_cast<uint32_t>(k_);
#pragma unroll 1
    while (true) {
      const uint32_t used = 32 - __clz(static_cast<int>(width));
      const uint32_t shift = used > Traits::kBinBits ? used - Traits::kBinBits : 0;
      for (uint32_t i = lane_; i < size_; i += 32) {
        const uint32_t key = entries_[i].x;
        if (key < low || key > high) continue;
        atomicAdd(&storage_.bins[min((key - low) >> shift, Traits::kBins - 1u)], 1u);
      }
      const TopKFound found = storage_.scan.search(storage_.bins, rank);
      low += found.bin << shift;
      if (found.bin != Traits::kBins - 1u && (high - low) >> shift != 0)
        high = low + ((1u << shift) - 1);
      rank = found.rank;
      if (found.count <= Traits::kFewKeys) break;
      if (low == high) {
        threshold_ = low;
        ties_ = rank;
        return;
      }
      width = high - low;
      __syncthreads();
      reinterpret_cast<uint4*>(storage_.bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
      __syncthreads();
    }
    for (uint32_t i = lane_; i < size_; i += 32) {
      const uint32_t key = entries_[i].x;
      if (key >= low && key <= high) storage_.few[atomicAdd(&storage_.few_size, 1u)] = key;
    }
    __syncthreads();
    // By every warp.
    const uint32_t few = storage_.few_size, mine = lane_ < few ? storage_.few[lane_] : 0;
    uint32_t larger = 0;
    for (uint32_t j = 0; j < few; ++j) larger += __shfl_sync(~0u, mine, static_cast<int>(j)) > mine;
    threshold_ = __reduce_min_sync(~0u, lane_ < few && larger < rank ? mine : ~0u);
    ties_ = rank - __popc(__ballot_sync(~0u, lane_ < few && mine > threshold_));
  }

  // ---- output

  __device__ void emit(int32_t* indices) {
    const uint32_t threshold = threshold_;
    uint32_t above = 0, equal = 0;
    for (uint32_t i = lane_; i < size_; i += 32) {
      const uint32_t key = entries_[i].x;
      above += key > threshold;
      equal += key == threshold;
    }
    above = __reduce_add_sync(~0u, above);
    equal = __reduce_add_sync(~0u, equal);
    if (lane_ == 0) storage_.counts[warp_] = {above, equal};
    __syncthreads();
    // Ties go to the smaller indices: warps before this one take theirs first.
    const bool is_before = lane_ < warp_;
    above = __reduce_add_sync(~0u, is_before ? storage_.counts[lane_].above : 0);
    equal = __reduce_add_sync(~0u, is_before ? storage_.counts[lane_].equal : 0);
    const uint32_t lanes_before = (1u << lane_) - 1;
    for (uint32_t begin = 0; begin < size_; begin += 32) {
      const uint2 entry = begin + lane_ < size_ ? entries_[begin + lane_] : make_uint2(0, 0);
      const uint32_t is_above = __ballot_sync(~0u, entry.x > threshold);
      const uint32_t is_equal = __ballot_sync(~0u, entry.x == threshold);
      const uint32_t tie = equal + __popc(is_equal & lanes_before);
      const uint32_t place = above + __popc(is_above & lanes_before) + min(tie, ties_);
      if (entry.x > threshold || (entry.x == threshold && tie < ties_))
        indices[place] = static_cast<int32_t>(entry.y);
      above += __popc(is_above);
      equal += __popc(is_equal);
    }
  }

  Storage& storage_;
  const float* row_;
  int32_t n_, k_;
  int32_t begin_, end_;  // this warp's scores
  Team team_;
  const uint32_t lane_ = threadIdx.x % 32, warp_ = threadIdx.x / 32;
  bool aligned_, everything_;
  uint2* entries_ = nullptr;  // in the first CTA: this warp's, ascending indices
  uint32_t size_ = 0;
  uint32_t threshold_ = 0, ties_ = 0;
};

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
  const float* row = args.logits + token * args.logits_stride;
  if (TopKRow<Team>(storage.lists, row, n, part, k, team).run(indices)) return;
  __syncthreads();
  TopKWhole<Team>(storage.whole, row + part.begin, part, k, team).run(indices);
}

}  // namespace dsv4::nvidia
