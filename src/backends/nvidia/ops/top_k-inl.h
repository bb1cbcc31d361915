// top_k: exact selection of the k best scores of a row.
//
// Problem   n scores (up to 1,000,000) -> k indices (up to 2048): larger score first, then smaller
//           index; NaN counts as -inf, -0 as +0; ascending indices, then -1; and their slots, where
//           those are wanted
// Tiling    a team of 1..16 CTAs takes a row, its warps strips of 128 scores in turn:
//             sample     maxima of 64 groups of 8 to 128 scores, spread over the row; one of them
//                        is the cutoff, which some 2k scores of the row pass
//             list       one pass lists what is above the cutoff, in the shared memory of the first
//                        CTA, in any order, and counts what equals it
//             select     the first CTA: a histogram between the cutoff and the largest maximum
//                        finds the bin of the k-th key, and the few keys in it are ranked by
//                        comparing all with all. Crowded bins are cut up again. Where fewer than k
//                        are listed, as many equal scores cross the cutoff, it is the k-th key
//             emit       bits of the row, one for every taken score: places are counts of bits
//           Rows of at most kShortRow scores are the first CTA's (top_k_short-inl.h). When the
//           sample was wrong (fewer than k reach the cutoff, or too many pass), it reads the row
//           again and again (top_k_whole-inl.h). What is computed is integers: neither the cutoff
//           nor the number of CTAs can change it
// Budget    4 n bytes once: 64 x 65536 scores 16.8 MB = 3.9 us at 4.27 TB/s; the rest is latency:
//           three trips to memory, a dozen barriers, one of the team (docs/kernels/index_nvidia.md)
// Launch    grid (tokens * team), 512 threads, smem = sizeof(TopKStorage) 74 or 90 KB: 3 or 2
//           CTAs/SM
// Contract  1 <= k <= 2048; end <= k: identity. Logits need 4-byte alignment only (16 is faster);
//           what lies between a row's end and its width is read, not used
#pragma once
#include <cstdint>

#include "backends/nvidia/ops/top_k_short-inl.h"
#include "backends/nvidia/ops/top_k_whole-inl.h"

namespace dsv4::nvidia {

constexpr int kTopKMaxTeam = 16;

template <bool kSingle>
struct TopKStorage {
  static constexpr int kKeys = kSingle ? 7168 : 8192;  // of a row, listed
  static constexpr int kGroups = 64;                   // of the sample
  TopKSelection selection;
  using Bits = TopKBits<kSingle ? 32768 : 65536>;
  Bits bits;
  union {
    uint2 list[kKeys];  // (score, index); a part for each CTA
    TopKShortRange range;
  };
  uint32_t sizes[kTopKMaxTeam];  // of the parts; may be more than they hold
  uint32_t equal[kTopKMaxTeam];  // scores of each CTA that equal the cutoff
  uint32_t own_size;             // of this CTA's part
  alignas(16) float maxima[kGroups];
  float cutoff, largest;
};
static_assert(sizeof(TopKStorage<false>) <= 113 * 1024, "two CTAs on an SM of sm_90");
static_assert(sizeof(TopKStorage<true>) <= 75 * 1024, "three of them; sm_86 and sm_120 allow 99");

/// A team of one.
struct SingleCta {
  static constexpr bool kSingle = true;
  __device__ uint32_t rank() const { return 0; }
  __device__ uint32_t size() const { return 1; }
  __device__ void arrive() const {}
  __device__ void wait() const { __syncthreads(); }
  /// In the first CTA's shared memory.
  __device__ void add(uint32_t* local, uint32_t value) const { atomicAdd(local, value); }
  __device__ void store(uint2* local, uint2 value) const { *local = value; }
};

template <typename Team>
class TopKRow {
 public:
  using Traits = TopKTraits;
  using Storage = TopKStorage<Team::kSingle>;
  using Bits = typename Storage::Bits;
  static constexpr int kThreads = Traits::kThreads;

  /// Asks for the first scores of a row of at most `limit`, which may be longer than it is.
  __device__ TopKRow(Storage& storage, const float* row, int32_t limit, Team team)
      : storage_(storage), row_(row), team_(team), aligned_(is_aligned_to_16(row)) {
    first_ = kStrip * static_cast<int32_t>(warp_ * team_.size() + team_.rank()) +
             4 * static_cast<int32_t>(lane_);
    strips_step_ = kStrip * static_cast<int32_t>(Traits::kWarps * team_.size());
    load(values_, first_, limit);
  }

  /// k < n. What of the storage must be clear is.
  __device__ void run(int32_t n, int32_t k, const TopKOutput& output) {
    n_ = n;
    k_ = k;
    sample();
    if (!Team::kSingle) team_.wait();  // all of them are there, and clear
    list();
    team_.arrive();
    if (team_.rank() != 0) return;  // nobody reads its memory
    team_.wait();
    auto* taken = reinterpret_cast<int32_t*>(storage_.selection.bins);  // when those are done with
    if (!collect()) {
      TopKWhole(storage_.selection, row_, n_, k_).run(storage_.bits, taken);
    } else if (listed_ >= static_cast<uint32_t>(k_)) {
      const uint32_t low = order_key(storage_.cutoff);
      const TopKThreshold threshold = find_threshold(
          storage_.selection,
          [&](auto&& f) { each([&](float score, uint32_t) { f(order_key(score)); }); }, low,
          order_key(storage_.largest) - low, static_cast<uint32_t>(k_));
      storage_.bits.take(storage_.selection.scan, n_, static_cast<uint32_t>(k_), threshold.ties,
                         taken, [&](int32_t base) { mark_listed(base, threshold.key); });
    } else {
      const float cutoff = storage_.cutoff;
      storage_.bits.take(
          storage_.selection.scan, n_, static_cast<uint32_t>(k_),
          static_cast<uint32_t>(k_) - listed_, taken, [&](int32_t base) {
            mark_row(storage_.bits, row_, base, n_,
                     [&](float score, bool&, bool& is_equal) { is_equal = score == cutoff; });
            mark_listed(base, 0);
          });
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < k_; i += kThreads) output.put(i, taken[i]);
  }

 private:
  static constexpr int kVectors = 4;
  static constexpr int kStrip = 128;
  static constexpr int kMaxRun = 16;  // scores that a thread samples
  static constexpr int kPiece = 4;    // of them are neighbours

  // ---- the cutoff

  __device__ void sample() {
    constexpr int kGroupLanes = kThreads / Storage::kGroups;
    // Groups take turns over the row, as often as a thread looks: each one has seen all of it. The
    // place is at random, as rows may repeat themselves.
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t group = thread / kGroupLanes, member = thread % kGroupLanes;
    int32_t run = max(1, min(min(n_ / kThreads, kMaxRun), n_ / (4 * kGroupLanes * k_)));
    if (run > kPiece) run = run / kPiece * kPiece;
    const int32_t pieces = (run + kPiece - 1) / kPiece, step = n_ / (kThreads * pieces);
    const auto places = static_cast<uint32_t>(max(1, step - kPiece + 1));
    const float* const begin = row_ + (member * Storage::kGroups + group) * step;
    float4 samples[kMaxRun / kPiece];
    uint32_t random = (threadIdx.x + 1) * 0x9e3779b1u;
#pragma unroll
    for (int i = 0; i < kMaxRun / kPiece; ++i) {
      random = (random ^ random >> 15) * 0x85ebca6bu;
      const float* from = begin + i * kThreads * step + __umulhi(random, places);
      samples[i] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
      if (i >= pieces) continue;
      samples[i].x = __ldg(from);
      if (run > 1) samples[i].y = __ldg(from + 1);
      if (run > 2) samples[i].z = __ldg(from + 2);
      if (run > 3) samples[i].w = __ldg(from + 3);
    }
    // A group's maximum is below the k-th score with probability p: the cutoff is the maximum that
    // is 4.5 deviations less than the mean number of those.
    const float p = __expf(-static_cast<float>(run * kGroupLanes) * static_cast<float>(k_) /
                           static_cast<float>(n_));
    const float mean = Storage::kGroups * p;
    const int wanted = max(0, static_cast<int>(mean - 4.5f * __fsqrt_rn(mean * (1.0f - p))));
    // Not below -FLT_MAX, and no NaN: what counts as -inf passes no cutoff.
    float largest = -3.402823466e38f;
#pragma unroll
    for (int i = 0; i < kMaxRun / kPiece; ++i) {
      largest = fmaxf(fmaxf(largest, fmaxf(samples[i].x, samples[i].y)),
                      fmaxf(samples[i].z, samples[i].w));
    }
#pragma unroll
    for (int lanes = 1; lanes < kGroupLanes; lanes *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    }
    if (member == 0) storage_.maxima[group] = largest;
    __syncthreads();
    // How many maxima are below this group's; 8 for each lane.
    static_assert(kGroupLanes == 8 && Storage::kGroups == 64);
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
    if (member == 0 && rank == wanted) storage_.cutoff = largest;
    if (member == 0 && rank == Storage::kGroups - 1) storage_.largest = largest;
    __syncthreads();
  }

  // ---- the lists

  // Scores [at, at + 4) of this lane in four strips, the first at `at`.
  __device__ void load(float4 (&values)[kVectors], int32_t at, int32_t limit) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      values[u] = load_scores(row_, at + u * strips_step_, limit, aligned_);
  }

  // What was asked for before the row's end was known; NaN passes nothing.
  __device__ void cut_to_row(int32_t at) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int32_t left = n_ - (at + u * strips_step_);
      if (left < 1) values_[u].x = NAN;
      if (left < 2) values_[u].y = NAN;
      if (left < 3) values_[u].z = NAN;
      if (left < 4) values_[u].w = NAN;
    }
  }

  __device__ void list() {
    const float cutoff = storage_.cutoff;
    uint32_t size = 0, equal = 0;
    const int32_t lane_at = 4 * static_cast<int32_t>(lane_);
    if (first_ - lane_at + kVectors * strips_step_ > n_) cut_to_row(first_);
#pragma unroll 1
    for (int32_t at = first_; at - lane_at < n_; at += kVectors * strips_step_) {
      float4 next[kVectors];
      load(next, at + kVectors * strips_step_, n_);
      uint32_t passed = 0;  // bit 4 u + c: component c of vector u
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const float4 value = values_[u];
        passed |= ((value.x > cutoff ? 1u : 0u) | (value.y > cutoff ? 2u : 0u) |
                   (value.z > cutoff ? 4u : 0u) | (value.w > cutoff ? 8u : 0u))
                  << (4 * u);
        equal +=
            (value.x == cutoff) + (value.y == cutoff) + (value.z == cutoff) + (value.w == cutoff);
      }
      if (__any_sync(~0u, passed != 0)) size += append(at, passed);
#pragma unroll
      for (int u = 0; u < kVectors; ++u) values_[u] = next[u];
    }
    equal = __reduce_add_sync(~0u, equal);
    if (lane_ == 0) {
      if (size > 0) team_.add(&storage_.sizes[team_.rank()], size);
      if (equal > 0) team_.add(&storage_.equal[team_.rank()], equal);
    }
  }

  // @return how many of the warp's scores passed.
  __device__ uint32_t append(int32_t at, uint32_t passed) {
    const uint32_t own = __popc(passed);
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane_ >= static_cast<uint32_t>(step)) sum += other;
    }
    const uint32_t total = __shfl_sync(~0u, sum, 31);
    uint32_t begin = 0;
    if (lane_ == 0) begin = atomicAdd(&storage_.own_size, total);
    uint32_t place = __shfl_sync(~0u, begin, 0) + sum - own;
    const uint32_t part = part_size();
    uint2* list = storage_.list + team_.rank() * part;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      for (uint32_t bits = passed >> (4 * u) & 15u; bits != 0; bits &= bits - 1, ++place) {
        const int c = __ffs(static_cast<int>(bits)) - 1;
        const float score = c == 0   ? values_[u].x
                            : c == 1 ? values_[u].y
                            : c == 2 ? values_[u].z
                                     : values_[u].w;
        if (place < part) {
          team_.store(list + place, make_uint2(__float_as_uint(score),
                                               static_cast<uint32_t>(at + u * strips_step_ + c)));
        }
      }
    }
    return total;
  }
  // Teams are powers of two.
  __device__ uint32_t team_log2() const {
    return __ffs(static_cast<int>(team_.size())) - 1;
  }
  __device__ uint32_t part_size() const {
    return uint32_t{Storage::kKeys} >> team_log2();
  }

  // ---- in the first CTA

  // @return whether the lists are of use.
  __device__ bool collect() {
    const bool is_part = lane_ < team_.size();
    const uint32_t size = is_part ? storage_.sizes[lane_] : 0;
    listed_ = __reduce_add_sync(~0u, size);
    // Warps share a part, or take one each.
    static_assert(Traits::kWarps == 16 && kTopKMaxTeam <= 16);
    const uint32_t warps_log2 = 4 - team_log2();  // of a part
    const uint32_t part = warp_ >> warps_log2, begin = part * part_size();
    share_ = begin + 32 * (warp_ & ((1u << warps_log2) - 1)) + lane_;
    share_end_ = begin + __shfl_sync(~0u, size, static_cast<int>(part));
    share_step_ = 32u << warps_log2;
    const uint32_t reach = listed_ + __reduce_add_sync(~0u, is_part ? storage_.equal[lane_] : 0);
    return __reduce_max_sync(~0u, size) <= part_size() && reach >= static_cast<uint32_t>(k_);
  }

  // f(score, index) of this thread's share of the lists.
  template <typename F>
  __device__ void each(F&& f) const {
    for (uint32_t i = share_; i < share_end_; i += share_step_) {
      const uint2 entry = storage_.list[i];
      f(__uint_as_float(entry.x), entry.y);
    }
    __syncwarp();  // or the lanes stay apart in what follows
  }

  __device__ void mark_listed(int32_t base, uint32_t threshold) {
    each([&](float score, uint32_t index) {
      const uint32_t at = index - static_cast<uint32_t>(base);
      if (at >= Bits::kWindow) return;
      const uint32_t key = order_key(score);
      if (key < threshold) return;
      atomicOr(key == threshold ? &storage_.bits.equal[at / 32] : &storage_.bits.above[at / 32],
               1u << at % 32);
    });
  }

  Storage& storage_;
  const float* row_;
  Team team_;
  bool aligned_;
  const uint32_t lane_ = threadIdx.x % 32, warp_ = threadIdx.x / 32;
  int32_t first_, strips_step_;  // of this lane; scores between strips of a warp
  float4 values_[kVectors];
  int32_t n_ = 0, k_ = 0;
  uint32_t listed_ = 0;                                  // in the first CTA, of the row
  uint32_t share_ = 0, share_end_ = 0, share_step_ = 0;  // entries of this thread
};

/// Before anything of the row is known, and before the kernels before have ended.
template <typename Team>
__device__ void prepare_top_k(TopKStorage<Team::kSingle>& storage, Team team) {
  storage.selection.clear();
  storage.bits.clear();
  if (threadIdx.x < kTopKMaxTeam) storage.sizes[threadIdx.x] = storage.equal[threadIdx.x] = 0;
  if (threadIdx.x == 0) storage.own_size = 0;
  team.arrive();
}

template <typename Team>
__device__ void top_k_row(TopKStorage<Team::kSingle>& storage, const TopKArgs& args, int64_t token,
                          Team team) {
  const float* row = args.logits + token * args.logits_stride;
  const int32_t n = min(max(args.end[token], 0), args.width), k = args.k;
  TopKRow<Team> scores(storage, row, args.width, team);
  if (n <= TopKTraits::kShortRow) {
    if (team.rank() != 0) return;
    TopKShort few;
    few.load(row, n);
    return top_k_short_row(storage.selection, storage.range, args, token, n, few);
  }
  if (team.rank() == 0 && threadIdx.x == 0) args.length[token] = k;
  scores.run(n, k, TopKOutput(args, token));
}

}  // namespace dsv4::nvidia
