#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/fail.h"

namespace dsv4 {
namespace {

// A bijection of 64 bits in which every input bit flips every output bit with probability near 1/2
// (the finaliser of splitmix64).
uint64_t scramble(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio: sets small keys apart

struct Candidate {
  float logit;
  int32_t id;
};

bool comes_first(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Candidates in canonical order, sorted only as far as they are asked for: a draw rarely needs more
// than some tens of a vocabulary of 129280.
class Ordered {
 public:
  explicit Ordered(std::vector<Candidate>& all) : all_(all) {}

  const Candidate& at(size_t i) {
    while (i >= sorted_) sort_to(std::max<size_t>(64, 8 * sorted_));
    return all_[i];
  }
  /// Drops everything after the first `count`.
  void keep(size_t count) {
    if (count >= all_.size()) return;
    sort_to(count);
    all_.resize(count);
  }
  size_t size() const { return all_.size(); }

 private:
  void sort_to(size_t count) {
    count = std::min(count, all_.size());
    if (count <= sorted_) return;
    const auto at = [&](size_t i) { return all_.begin() + static_cast<ptrdiff_t>(i); };
    if (count < all_.size()) std::nth_element(at(sorted_), at(count), all_.end(), comes_first);
    std::sort(at(sorted_), at(count), comes_first);
    sorted_ = count;
  }

  std::vector<Candidate>& all_;
  size_t sorted_ = 0;
};

}  // namespace

double uniform_at(uint64_t seed, uint64_t sequence, uint64_t position) {
  uint64_t x = scramble(seed + kGolden);
  x = scramble((x ^ sequence) + kGolden);
  x = scramble((x ^ position) + kGolden);
  return static_cast<double>(x >> 11) * 0x1p-53;
}

Sampler::Sampler(const SamplingOptions& options) : options_(options) {
  if (!std::isfinite(options.temperature) || options.temperature < 0) {
    fail(ErrorCode::kInvalidArgument, "temperature ", options.temperature,
         ", expected a finite number, 0 or more");
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    fail(ErrorCode::kInvalidArgument, "top_p ", options.top_p, ", expected above 0 and at most 1");
  }
  if (options.top_k < 0) {
    fail(ErrorCode::kInvalidArgument, "top_k ", options.top_k,
         ", expected 0 (no limit) or a number of tokens");
  }
}

int32_t Sampler::draw(std::span<const float> logits, uint64_t sequence, int64_t position) const {
  if (logits.empty()) fail(ErrorCode::kInvalidArgument, "no logits to draw from");
  size_t best = logits.size();
  for (size_t id = 0; id < logits.size(); ++id) {
    // Comparisons with NaN are false, so that NaN never becomes the best.
    const float best_logit =
        best == logits.size() ? -std::numeric_limits<float>::infinity() : logits[best];
    if (logits[id] > best_logit) best = id;
  }
  if (best == logits.size()) {
    fail(ErrorCode::kInternal, "none of ", logits.size(), " logits at position ", position,
         " is a number above -inf");
  }
  if (options_.temperature == 0 || options_.top_k == 1) return static_cast<int32_t>(best);

  const float largest = logits[best];
  const auto weight_of = [&](float logit) {
    if (logit == largest) return 1.0;  // also where the difference would be inf - inf
    return std::exp((double{logit} - double{largest}) / options_.temperature);
  };
  // Tokens without weight cannot be drawn: NaN, -inf and all that underflows.
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  double total = 0;
  for (size_t id = 0; id < logits.size(); ++id) {
    const double weight = std::isnan(logits[id]) ? 0.0 : weight_of(logits[id]);
    if (weight == 0) continue;
    candidates.push_back({logits[id], static_cast<int32_t>(id)});
    total += weight;
  }

  Ordered ordered(candidates);
  if (options_.top_k > 0 && static_cast<size_t>(options_.top_k) < ordered.size()) {
    ordered.keep(static_cast<size_t>(options_.top_k));
    total = 0;
    for (size_t i = 0; i < ordered.size(); ++i) total += weight_of(ordered.at(i).logit);
  }
  if (options_.top_p < 1) {
    const double wanted = options_.top_p * total;
    double kept = 0;
    size_t count = 0;
    while (count < ordered.size() && (count == 0 || kept < wanted)) {
      kept += weight_of(ordered.at(count++).logit);
    }
    ordered.keep(count);
    total = kept;
  }

  const double target =
      uniform_at(options_.seed, sequence, static_cast<uint64_t>(position)) * total;
  double passed = 0;
  for (size_t i = 0; i + 1 < ordered.size(); ++i) {
    const Candidate& candidate = ordered.at(i);
    passed += weight_of(candidate.logit);
    if (target < passed) return candidate.id;
  }
  // What is left, also when rounding let the sum in this order end below the target.
  return ordered.at(ordered.size() - 1).id;
}

}  // namespace dsv4
