// Exact selection of the k best scores of a row: larger score first, then smaller index.
//
// Problem   n scores (up to 262144) -> k indices (up to 2048), ascending; NaN counts as -inf,
//           -0 as +0
// Method    a sample of the row gives a cutoff that a few times k scores pass; one pass keeps those
//           as candidates, in index order; when fewer than k pass, all are candidates. Histograms
//           of 11, 11 and 10 bits of order-preserving integers, over the candidates only, give the
//           exact threshold and how many ties with it are taken (the first ones: smaller index).
//           The cutoff decides how much is looked at twice, never what is chosen; so neither the
//           threads nor the cut into parts can change the result.
// Parallel  over tokens; over parts of the row when there are fewer tokens than threads
// Budget    one compare per score on the pass over the row (4 n bytes from L2 or L3)
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "backends/cpu/candidates.h"
#include "backends/cpu/ops/top_k.h"
#include "backends/cpu/parallel.h"

namespace dsv4::cpu {
namespace {

constexpr int kTopShift = 21;  // 11 upper bits
constexpr int kMidShift = 10;  // 11 bits below
constexpr int64_t kMinSampleStep = 16, kMaxSample = 4096;
constexpr int64_t kMinPart = 8192;
constexpr int kMaxParts = 64;

// Order-preserving: a < b as scores <=> key(a) < key(b).
inline uint32_t order_key(float score) {
  uint32_t bits = std::bit_cast<uint32_t>(score);
  bits = bits == 0x80000000u ? 0u : bits;                          // -0 ties with +0
  bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0xff800000u : bits;  // NaN -> -inf
  const uint32_t negative = static_cast<uint32_t>(-static_cast<int32_t>(bits >> 31));
  return bits ^ (negative | 0x80000000u);
}
/// The score of a key.
inline float score_of(uint32_t key) {
  return std::bit_cast<float>((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

struct Entry {
  uint32_t key;
  int32_t index;
};

// A stretch of a row and where its candidates ended up.
struct Part {
  int64_t begin, end;
  int64_t kept;
};

struct RowScratch {
  Part parts[kMaxParts];
  uint32_t bins[kCutoffBins];
};

// Largest bin such that bins above it hold fewer than `wanted`; returns what is still wanted of it.
int64_t threshold_bin(const uint32_t* bins, int64_t wanted, uint32_t& bin) {
  bin = kCutoffBins - 1;
  while (bin > 0 && bins[bin] < wanted) wanted -= bins[bin--];
  return wanted;
}

class Row {
 public:
  Row(const float* scores, int64_t n, int64_t k, int64_t num_parts, RowScratch& scratch,
      Entry* entries)
      : scores_(scores), n_(n), k_(k), num_parts_(num_parts), scratch_(scratch), entries_(entries) {
    const int64_t step = round_up(ceil_div(n, num_parts), 16);
    for (int64_t p = 0; p < num_parts; ++p) {
      scratch.parts[p] = {std::min(n, p * step), std::min(n, (p + 1) * step), 0};
    }
  }

  void choose_cutoff() {
    everything_ = n_ < 8 * k_ || n_ < 2048;
    if (!everything_) cutoff_ = sampled_cutoff(scores_, n_, k_, scratch_.bins);
  }

  // Candidates of a part, in index order, at the part's own place.
  void keep(int64_t part_idx) {
    Part& part = scratch_.parts[part_idx];
    Entry* out = entries_ + part.begin;
    int64_t i = part.begin;
    if (everything_) {
      for (; i < part.end; ++i) *out++ = {order_key(scores_[i]), static_cast<int32_t>(i)};
    } else {
      constexpr int64_t kStep = 16;
      for (; i + kStep <= part.end; i += kStep) {
        // Few steps hold a candidate; the test over 16 scores is vector code.
        int any = 0;
        for (int64_t j = 0; j < kStep; ++j) any |= scores_[i + j] >= cutoff_;
        if (any != 0) out = keep_some(i, i + kStep, out);
      }
      out = keep_some(i, part.end, out);
    }
    part.kept = out - (entries_ + part.begin);
  }

  // Closes the candidates up; false when there are too few, and then all scores are candidates of
  // the next keep().
  bool gather() {
    count_ = 0;
    for (int64_t p = 0; p < num_parts_; ++p) {
      const Part& part = scratch_.parts[p];
      std::memmove(entries_ + count_, entries_ + part.begin,
                   static_cast<size_t>(part.kept) * sizeof(Entry));
      count_ += part.kept;
    }
    everything_ = true;
    return count_ >= k_;
  }

  void emit(int32_t* indices) {
    int64_t wanted = k_;
    uint32_t prefix = 0;
    for (const auto& [shift, bits] : {std::pair{kTopShift, 11}, {kMidShift, 11}, {0, 10}}) {
      uint32_t* bins = scratch_.bins;
      std::fill_n(bins, kCutoffBins, 0u);
      const int above = shift + bits;
      const uint32_t mask = (1u << bits) - 1;
      for (int64_t i = 0; i < count_; ++i) {
        const uint32_t key = entries_[i].key;
        if (above == 32 || key >> above == prefix) ++bins[key >> shift & mask];
      }
      uint32_t bin;
      wanted = threshold_bin(bins, wanted, bin);
      prefix = prefix << bits | bin;
    }
    for (int64_t i = 0, emitted = 0; i < count_ && emitted < k_; ++i) {
      const uint32_t key = entries_[i].key;
      if (key > prefix || (key == prefix && wanted-- > 0)) indices[emitted++] = entries_[i].index;
    }
  }

 private:
  Entry* keep_some(int64_t begin, int64_t end, Entry* out) const {
    for (int64_t i = begin; i < end; ++i) {
      if (scores_[i] >= cutoff_) *out++ = {order_key(scores_[i]), static_cast<int32_t>(i)};
    }
    return out;
  }

  const float* scores_;
  int64_t n_, k_;
  int64_t num_parts_;
  RowScratch& scratch_;
  Entry* entries_;
  bool everything_ = true;
  float cutoff_ = 0;
  int64_t count_ = 0;
};

}  // namespace

float cutoff_of(const float* scores, int64_t n, int64_t step, int64_t wanted, uint32_t* bins) {
  // Upper bits alone are coarse: a quarter of the scores may share the sign, the exponent and two
  // bits of the mantissa.
  uint32_t upper, lower;
  std::fill_n(bins, kCutoffBins, 0u);
  for (int64_t i = 0; i < n; i += step) ++bins[order_key(scores[i]) >> kTopShift];
  wanted = threshold_bin(bins, wanted, upper);
  std::fill_n(bins, kCutoffBins, 0u);
  for (int64_t i = 0; i < n; i += step) {
    const uint32_t key = order_key(scores[i]);
    bins[key >> kMidShift & (kCutoffBins - 1)] += key >> kTopShift == upper;
  }
  threshold_bin(bins, wanted, lower);
  const uint32_t lowest = upper << kTopShift | lower << kMidShift;
  return std::max(score_of(std::max(lowest, order_key(-std::numeric_limits<float>::infinity()))),
                  std::numeric_limits<float>::lowest());
}

float sampled_cutoff(const float* scores, int64_t n, int64_t k, uint32_t* bins) {
  const int64_t step = std::max(kMinSampleStep, n / kMaxSample);
  // Of the k best so many are in a sample, give or take a square root: five of them fail once in
  // 100,000 rows.
  const double expected = static_cast<double>(k) / static_cast<double>(step);
  const double wanted = expected + 5 * std::sqrt(expected) + 1;
  return cutoff_of(scores, n, step, static_cast<int64_t>(wanted), bins);
}

void top_k(const TopKParams& params, const OpContext& context) {
  const int64_t tokens = params.logits.shape[0], k = params.topk_indices.shape[1];
  int64_t width = params.logits.shape[1];
  if (!context.scratch->measuring() && tokens > 0) {
    width = std::clamp<int64_t>(*std::max_element(params.end, params.end + tokens), 0, width);
  }
  const int threads = num_threads(context.stream);
  // With as many tokens as threads a token is one part; else its row is cut.
  const bool cut = tokens < threads;
  const int64_t parts =
      cut ? std::clamp<int64_t>(width / kMinPart, 1, std::min<int64_t>(kMaxParts, 2 * threads)) : 1;
  const int64_t rows_at_once = cut ? 1 : threads;
  Arena::Scope scope(*context.scratch);
  auto* all_scratch = context.scratch->take_array<RowScratch>(rows_at_once);
  Entry* all_entries = context.scratch->take_array<Entry>(rows_at_once * width);
  if (context.scratch->measuring()) return;

  const auto trivial = [&](int64_t t) {
    const int64_t n = std::max(params.end[t], 0), used = std::min(n, k);
    int32_t* indices = params.topk_indices.as<int32_t>() + t * params.topk_indices.strides[0];
    params.topk_length[t] = static_cast<int32_t>(used);
    for (int64_t i = used; i < k; ++i) indices[i] = -1;
    if (n > k && k > 0) return false;
    for (int64_t i = 0; i < used; ++i) indices[i] = static_cast<int32_t>(i);
    return true;
  };
  const auto row_of = [&](int64_t t, int64_t place, int64_t num_parts) {
    return Row(params.logits.as<float>() + t * params.logits.strides[0], params.end[t], k,
               num_parts, all_scratch[place], all_entries + place * width);
  };
  const auto indices_of = [&](int64_t t) {
    return params.topk_indices.as<int32_t>() + t * params.topk_indices.strides[0];
  };

  if (!cut) {
    parallel_chunks(context.stream, tokens, 1, [&](int64_t t, int64_t, int thread_idx) {
      if (trivial(t)) return;
      Row row = row_of(t, threads == 1 ? 0 : thread_idx, 1);
      row.choose_cutoff();
      do row.keep(0);
      while (!row.gather());
      row.emit(indices_of(t));
    });
    return;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (trivial(t)) continue;
    Row row = row_of(t, 0, parts);
    row.choose_cutoff();
    do {
      parallel_chunks(context.stream, parts, 1, [&](int64_t p, int64_t, int) { row.keep(p); });
    } while (!row.gather());
    row.emit(indices_of(t));
  }
}

int64_t top_k_scratch_bytes(const ScratchLimits& limits) {
  const int64_t threads = std::max(1, limits.num_threads);
  return threads * static_cast<int64_t>(sizeof(RowScratch)) +
         threads * limits.max_entries * static_cast<int64_t>(sizeof(Entry)) + 2 * Arena::kAlignment;
}

}  // namespace dsv4::cpu
