// Exact selection of the k best scores of a row: larger score first, then smaller index.
//
// Problem   n scores (up to 262144) -> k indices (up to 2048), ascending; NaN counts as -inf,
//           -0 as +0
// Method    scores become unsigned integers of the same order; a histogram of their upper 11 bits
//           finds the bin that holds the k-th best; one more pass keeps the candidates of that bin
//           and above, in index order; histograms of the next 11 and the last 10 bits, over the
//           candidates only, give the exact threshold and how many ties with it are taken (the
//           first ones: smaller index). Only integers are counted, so neither the threads nor the
//           cut into parts can change the result.
// Parallel  over tokens; over parts of the row when there are fewer tokens than threads
// Budget    two passes over 4 n bytes from L2/L3; about 1 ns an element, 0.26 ms at 262144
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "backends/cpu/candidates.h"
#include "backends/cpu/parallel.h"

namespace dsv4::cpu {
namespace {

constexpr int kBins = 2048;
constexpr int kTopShift = 21;  // 11 upper bits
constexpr int kMidShift = 10;  // 11 bits below
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

struct Entry {
  uint32_t key;
  int32_t index;
};

struct Part {
  uint32_t bins[2][kBins];  // two, so that equal neighbours do not wait for each other
  int64_t begin, end;
  int64_t kept;
};

// Largest bin such that bins above it hold fewer than `wanted`; returns what is still wanted of it.
int64_t threshold_bin(const uint32_t* bins, int64_t wanted, uint32_t& bin) {
  bin = kBins - 1;
  while (bins[bin] < wanted) wanted -= bins[bin--];
  return wanted;
}

class Row {
 public:
  Row(const float* scores, int64_t n, int64_t k, Part* parts, int64_t num_parts, Entry* entries)
      : scores_(scores), n_(n), k_(k), parts_(parts), num_parts_(num_parts), entries_(entries) {
    const int64_t step = round_up(ceil_div(n, num_parts), 16);
    for (int64_t p = 0; p < num_parts; ++p) {
      parts[p].begin = std::min(n, p * step);
      parts[p].end = std::min(n, (p + 1) * step);
    }
  }

  void count(int64_t part_idx) {
    Part& part = parts_[part_idx];
    std::memset(part.bins, 0, sizeof(part.bins));
    int64_t i = part.begin;
    for (; i + 1 < part.end; i += 2) {
      ++part.bins[0][order_key(scores_[i]) >> kTopShift];
      ++part.bins[1][order_key(scores_[i + 1]) >> kTopShift];
    }
    if (i < part.end) ++part.bins[0][order_key(scores_[i]) >> kTopShift];
  }

  void find_top_bin() {
    uint32_t* total = parts_[0].bins[0];
    for (int64_t p = 0; p < num_parts_; ++p) {
      for (int b = 0; b < 2; ++b) {
        if (p == 0 && b == 0) continue;
        for (int i = 0; i < kBins; ++i) total[i] += parts_[p].bins[b][i];
      }
    }
    wanted_ = threshold_bin(total, k_, top_bin_);
  }

  // Entries of the threshold bin and above, in index order, at the part's own place.
  void keep(int64_t part_idx) {
    Part& part = parts_[part_idx];
    const uint32_t lowest = top_bin_ << kTopShift;
    Entry* out = entries_ + part.begin;
    constexpr int64_t kStep = 16;
    int64_t i = part.begin;
    for (; i + kStep <= part.end; i += kStep) {
      // Few blocks hold a candidate; the test over 16 scores is vector code.
      uint32_t any = 0;
      for (int64_t j = 0; j < kStep; ++j) any |= order_key(scores_[i + j]) >= lowest;
      if (any != 0) out = keep_some(i, i + kStep, lowest, out);
    }
    out = keep_some(i, part.end, lowest, out);
    part.kept = out - (entries_ + part.begin);
  }

  void emit(int32_t* indices) {
    int64_t count = 0;
    for (int64_t p = 0; p < num_parts_; ++p) {
      std::memmove(entries_ + count, entries_ + parts_[p].begin,
                   static_cast<size_t>(parts_[p].kept) * sizeof(Entry));
      count += parts_[p].kept;
    }
    uint32_t* bins = parts_[0].bins[0];
    uint32_t mid_bin, low_bin;
    std::fill_n(bins, kBins, 0u);
    for (int64_t i = 0; i < count; ++i) {
      if (entries_[i].key >> kTopShift == top_bin_) ++bins[entries_[i].key >> kMidShift & 2047];
    }
    wanted_ = threshold_bin(bins, wanted_, mid_bin);
    const uint32_t prefix = top_bin_ << (kTopShift - kMidShift) | mid_bin;
    std::fill_n(bins, kBins, 0u);
    for (int64_t i = 0; i < count; ++i) {
      if (entries_[i].key >> kMidShift == prefix) ++bins[entries_[i].key & 1023];
    }
    wanted_ = threshold_bin(bins, wanted_, low_bin);
    const uint32_t threshold = prefix << kMidShift | low_bin;
    for (int64_t i = 0, emitted = 0; i < count && emitted < k_; ++i) {
      const uint32_t key = entries_[i].key;
      if (key > threshold || (key == threshold && wanted_-- > 0)) {
        indices[emitted++] = entries_[i].index;
      }
    }
  }

 private:
  Entry* keep_some(int64_t begin, int64_t end, uint32_t lowest, Entry* out) const {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t key = order_key(scores_[i]);
      if (key >= lowest) *out++ = {key, static_cast<int32_t>(i)};
    }
    return out;
  }

  const float* scores_;
  int64_t n_, k_;
  Part* parts_;
  int64_t num_parts_;
  Entry* entries_;
  uint32_t top_bin_ = 0;
  int64_t wanted_ = 0;
};

}  // namespace

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
  Part* all_parts = context.scratch->take_array<Part>(rows_at_once * parts);
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
               all_parts + place * parts, num_parts, all_entries + place * width);
  };
  const auto indices_of = [&](int64_t t) {
    return params.topk_indices.as<int32_t>() + t * params.topk_indices.strides[0];
  };

  if (!cut) {
    parallel_chunks(context.stream, tokens, 1, [&](int64_t t, int64_t, int thread_idx) {
      if (trivial(t)) return;
      Row row = row_of(t, threads == 1 ? 0 : thread_idx, 1);
      row.count(0);
      row.find_top_bin();
      row.keep(0);
      row.emit(indices_of(t));
    });
    return;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (trivial(t)) continue;
    Row row = row_of(t, 0, parts);
    parallel_chunks(context.stream, parts, 1, [&](int64_t p, int64_t, int) { row.count(p); });
    row.find_top_bin();
    parallel_chunks(context.stream, parts, 1, [&](int64_t p, int64_t, int) { row.keep(p); });
    row.emit(indices_of(t));
  }
}

int64_t top_k_scratch_bytes(const ScratchLimits& limits) {
  const int64_t threads = std::max(1, limits.num_threads);
  return (threads * 2 + kMaxParts) * static_cast<int64_t>(sizeof(Part)) +
         threads * limits.max_entries * static_cast<int64_t>(sizeof(Entry)) + 2 * Arena::kAlignment;
}

}  // namespace dsv4::cpu
