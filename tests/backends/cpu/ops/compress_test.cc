// The compressor against double precision, and its independence of chunks, batches and threads.
#include <set>

#include "cache/kv_format.h"
#include "tests/backends/cpu/ops/rowwise_testing.h"

namespace dsv4::cpu::testing {
namespace {

struct Shape {
  int32_t ratio;
  bool overlap;
  int64_t width;
  int32_t rope_dim;
  bool hadamard;
  DType act;
  KvFormat format;
  int64_t half() const { return (overlap ? 2 : 1) * width; }
  int32_t pooled() const { return (overlap ? 2 : 1) * ratio; }
};

void PrintTo(const Shape& shape, std::ostream* out) {
  *out << "ratio " << shape.ratio << (shape.overlap ? " overlapping" : "") << ", width "
       << shape.width << (shape.hadamard ? ", Hadamard" : "") << ", "
       << kv_format_name(shape.format);
}

// Sequences with all their gates; steps feed any part of them.
class Compression {
 public:
  Compression(const Shape& shape, std::vector<int64_t> lengths)
      : shape_(shape), lengths_(std::move(lengths)) {
    const int64_t max_length = *std::max_element(lengths_.begin(), lengths_.end());
    entries_per_seq_ = max_length / shape.ratio + 1;
    for (size_t s = 0; s < lengths_.size(); ++s) {
      gates_.push_back(
          random_floats(lengths_[s] * 2 * shape.half(), 100 + static_cast<uint32_t>(s)));
    }
    ape_ = random_floats(shape.ratio * shape.half(), 7);
    norm_ = Storage(DType::kBf16, random_floats(shape.width, 8));
    for (int i = 0; i < shape.rope_dim / 2; ++i)
      frequencies_.push_back(static_cast<float>(std::pow(160000.0, -2.0 * i / shape.rope_dim)));
    reset();
  }

  // Empty state and cache. Rings and cache rows start as NaN: reading one that was never written
  // shows.
  void reset() {
    const int64_t seqs = static_cast<int64_t>(lengths_.size());
    done_.assign(lengths_.size(), 0);
    state_.assign(static_cast<size_t>(seqs * shape_.pooled() * 2 * shape_.half()), std::nanf(""));
    cache_.assign(static_cast<size_t>(page_bytes(shape_.format, seqs * entries_per_seq_,
                                                 static_cast<int>(shape_.width))),
                  std::byte{0xff});
    entries_.assign(static_cast<size_t>(seqs * entries_per_seq_ * shape_.width), std::nanf(""));
  }

  // One step: `tokens[s]` new tokens of each sequence; `padding` tokens after them.
  void step(Runner& runner, const std::vector<int64_t>& tokens, int64_t padding = 0) {
    std::vector<int32_t> query_start{0}, context, slot, positions, token_to_seq;
    std::vector<int64_t> slots;
    std::vector<float> gates;
    for (size_t s = 0; s < tokens.size(); ++s) {
      context.push_back(static_cast<int32_t>(done_[s]));
      slot.push_back(static_cast<int32_t>(tokens.size() - 1 - s));  // not the identity
      for (int64_t i = 0; i < tokens[s]; ++i) {
        const int64_t position = done_[s] + i;
        positions.push_back(static_cast<int32_t>(position));
        token_to_seq.push_back(static_cast<int32_t>(s));
        slots.push_back((position + 1) % shape_.ratio == 0
                            ? static_cast<int64_t>(s) * entries_per_seq_ + position / shape_.ratio
                            : -1);
        const auto row = gates_[s].begin() + position * 2 * shape_.half();
        gates.insert(gates.end(), row, row + 2 * shape_.half());
      }
      done_[s] += tokens[s];
      query_start.push_back(static_cast<int32_t>(positions.size()));
    }
    for (int64_t i = 0; i < padding; ++i) {
      positions.push_back(0);
      token_to_seq.push_back(0);
      slots.push_back(-1);
      gates.insert(gates.end(), static_cast<size_t>(2 * shape_.half()), std::nanf(""));
    }
    const auto count = static_cast<int64_t>(positions.size());
    PlanView plan;
    plan.num_tokens = static_cast<int32_t>(count);
    plan.num_seqs = static_cast<int32_t>(tokens.size());
    plan.query_start = query_start.data();
    plan.context_len = context.data();
    plan.state_slot = slot.data();
    plan.positions = positions.data();
    plan.token_to_seq = token_to_seq.data();
    const RatioPlan ratio{.ratio = shape_.ratio, .slot_mapping = slots.data()};
    std::vector<float> tap(static_cast<size_t>(count * shape_.width), std::nanf(""));
    const int64_t rows = static_cast<int64_t>(lengths_.size()) * entries_per_seq_;
    runner.ops().compress(
        {.plan = &plan,
         .ratio = &ratio,
         .overlap = shape_.overlap,
         .gates = Tensor(gates.data(), DType::kF32, {count, 2 * shape_.half()}),
         .ape = Tensor(ape_.data(), DType::kF32, {shape_.ratio, shape_.half()}),
         .norm = norm_.view({shape_.width}),
         .eps = 1e-6f,
         .rope = {frequencies_.data(), shape_.rope_dim},
         .hadamard = shape_.hadamard,
         .activation = shape_.act,
         .state = {state_.data(), shape_.pooled() * 2 * shape_.half(),
                   static_cast<int32_t>(lengths_.size()), shape_.pooled(),
                   static_cast<int32_t>(2 * shape_.half())},
         .cache = {cache_.data(), static_cast<int64_t>(cache_.size()), 1,
                   static_cast<int32_t>(rows), shape_.format, static_cast<int32_t>(shape_.width)},
         .entries = Tensor(tap.data(), DType::kF32, {count, shape_.width})},
        runner.context());
    for (int64_t t = 0; t < count; ++t) {
      const auto row = tap.begin() + t * shape_.width;
      if (slots[static_cast<size_t>(t)] < 0) {
        EXPECT_TRUE(std::isnan(*row)) << "a token without entry wrote one";
      } else {
        std::copy_n(row, shape_.width,
                    entries_.begin() + slots[static_cast<size_t>(t)] * shape_.width);
      }
    }
  }

  // Feeds everything in steps of at most `chunk` tokens a sequence.
  void run(Runner& runner, int64_t chunk, int64_t padding = 0) {
    reset();
    for (bool more = true; more;) {
      more = false;
      std::vector<int64_t> tokens;
      for (size_t s = 0; s < lengths_.size(); ++s) {
        tokens.push_back(std::min(chunk, lengths_[s] - done_[s]));
        more = more || done_[s] + tokens.back() < lengths_[s];
      }
      step(runner, tokens, padding);
    }
  }

  // Entry j of a sequence in double precision, and the bound of the f32 error of each element.
  void expected_entry(size_t s, int64_t j, std::vector<double>& entry,
                      std::vector<double>& bound) const {
    const int64_t width = shape_.width, half = shape_.half();
    entry.assign(static_cast<size_t>(width), 0);
    bound.assign(static_cast<size_t>(width), 0);
    std::vector<double> pool_error(static_cast<size_t>(width));
    double squares = 0, squares_error = 0;
    for (int64_t c = 0; c < width; ++c) {
      std::vector<double> value, score;
      for (int64_t k = 0; k < shape_.pooled(); ++k) {
        const int64_t p = (j + 1) * shape_.ratio - shape_.pooled() + k;
        if (p < 0) continue;
        const int64_t channel = c + (shape_.overlap && k >= shape_.ratio ? width : 0);
        const float* row = gates_[s].data() + p * 2 * half;
        value.push_back(row[channel]);
        score.push_back(double{row[half + channel]} +
                        ape_[static_cast<size_t>(p % shape_.ratio * half + channel)]);
      }
      const double largest = *std::max_element(score.begin(), score.end());
      double sum = 0, pooled = 0, magnitude = 0, spread = 0;
      for (size_t k = 0; k < value.size(); ++k) {
        const double p = std::exp(score[k] - largest);
        sum += p;
        pooled += p * value[k];
        magnitude += p * std::fabs(value[k]);
        spread = std::max(spread, std::fabs(score[k]) + std::fabs(largest));
      }
      entry[static_cast<size_t>(c)] = pooled / sum;
      // Score: sum with ape and difference to the maximum, 2 roundings of at most `spread`, which
      // exp turns into relative errors; exp 2 ulp; product; sums of n terms, numerator and
      // denominator; quotient.
      const auto n = static_cast<double>(value.size());
      pool_error[static_cast<size_t>(c)] =
          magnitude / sum * (2 * (2 * spread + 4 + n) + 2) * kF32Eps;
      squares += pooled / sum * pooled / sum;
      squares_error += 2 * std::fabs(pooled / sum) * pool_error[static_cast<size_t>(c)];
    }
    const double mean = squares / static_cast<double>(width) + 1e-6f;
    const double factor = 1 / std::sqrt(mean);
    // Relative error of the factor: of the sum of squares by pooling (halved by the root) and by
    // its own roundings.
    const double factor_error =
        squares_error / (2 * squares) + (static_cast<double>(width) / 64 + 12) * kF32Eps;
    for (int64_t c = 0; c < width; ++c) {
      const auto i = static_cast<size_t>(c);
      const double scale = factor * norm_[c];
      bound[i] = std::fabs(scale) * pool_error[i] + std::fabs(entry[i] * scale) * factor_error;
      entry[i] *= scale;
    }
    const int64_t nope = width - shape_.rope_dim;
    for (int64_t i = 0; i < shape_.rope_dim / 2; ++i) {
      const auto a = static_cast<size_t>(nope + 2 * i);
      const double angle = static_cast<double>(static_cast<float>(j * shape_.ratio) *
                                               frequencies_[static_cast<size_t>(i)]);
      const double c = std::cos(angle), si = std::sin(angle), x = entry[a], y = entry[a + 1];
      entry[a] = x * c - y * si;
      entry[a + 1] = y * c + x * si;
      bound[a] = bound[a + 1] = bound[a] + bound[a + 1] + 4 * kF32Eps * std::hypot(x, y);
    }
    if (shape_.hadamard) {
      std::vector<double> mixed(entry.size());
      double total_bound = 0, total = 0;
      for (size_t i = 0; i < entry.size(); ++i) {
        total_bound += bound[i];
        total += std::fabs(entry[i]);
        for (size_t k = 0; k < entry.size(); ++k)
          mixed[i] += (std::popcount(i & k) % 2 == 0 ? 1 : -1) * entry[k];
      }
      const double norm = 1 / std::sqrt(static_cast<double>(width));
      for (size_t i = 0; i < entry.size(); ++i) {
        entry[i] = mixed[i] * norm;
        // log2(width) sums, each rounded relative to at most the sum of magnitudes.
        bound[i] = norm * (total_bound + total * (std::log2(width) + 2) * kF32Eps);
      }
    }
    if (shape_.act == DType::kBf16) {
      for (size_t i = 0; i < entry.size(); ++i) bound[i] += std::fabs(entry[i]) * kBf16Eps;
    }
  }

  void check_entries() const {
    for (size_t s = 0; s < lengths_.size(); ++s) {
      for (int64_t j = 0; j < entries_per_seq_; ++j) {
        const float* entry =
            entries_.data() + (static_cast<int64_t>(s) * entries_per_seq_ + j) * shape_.width;
        if (j >= lengths_[s] / shape_.ratio) {
          EXPECT_TRUE(std::isnan(entry[0])) << "entry " << j << " of sequence " << s << " exists";
          continue;
        }
        std::vector<double> expected, bound;
        expected_entry(s, j, expected, bound);
        for (int64_t c = 0; c < shape_.width; ++c) {
          ASSERT_NEAR(entry[c], expected[static_cast<size_t>(c)], bound[static_cast<size_t>(c)])
              << "sequence " << s << " entry " << j << " channel " << c;
        }
      }
    }
  }

  // The cache holds encode_row of every entry, and nothing else.
  void check_cache() const {
    std::vector<std::byte> expected(cache_.size(), std::byte{0xff});
    const int64_t rows = static_cast<int64_t>(lengths_.size()) * entries_per_seq_;
    const CacheView view{
        expected.data(), static_cast<int64_t>(expected.size()), 1, static_cast<int32_t>(rows),
        shape_.format,   static_cast<int32_t>(shape_.width)};
    for (int64_t row = 0; row < rows; ++row) {
      const float* entry = entries_.data() + row * shape_.width;
      if (!std::isnan(entry[0])) encode_row(view, row, entry);
    }
    EXPECT_TRUE(expected == cache_);
  }

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> out(cache_.size() + (entries_.size() + state_.size()) * sizeof(float));
    std::memcpy(out.data(), cache_.data(), cache_.size());
    std::memcpy(out.data() + cache_.size(), entries_.data(), entries_.size() * sizeof(float));
    std::memcpy(out.data() + cache_.size() + entries_.size() * sizeof(float), state_.data(),
                state_.size() * sizeof(float));
    return out;
  }
  // Entry j of sequence s.
  std::vector<float> entry(size_t s, int64_t j) const {
    const auto at =
        entries_.begin() + (static_cast<int64_t>(s) * entries_per_seq_ + j) * shape_.width;
    return {at, at + shape_.width};
  }
  int64_t entries_per_seq() const { return entries_per_seq_; }

 private:
  Shape shape_;
  std::vector<int64_t> lengths_;
  int64_t entries_per_seq_;
  std::vector<std::vector<float>> gates_;
  std::vector<float> ape_, frequencies_;
  Storage norm_;
  std::vector<int64_t> done_;
  std::vector<float> state_;
  std::vector<std::byte> cache_;
  std::vector<float> entries_;
};

constexpr Shape kCsa{4, true, 512, 64, false, DType::kBf16, KvFormat::kFp8DsMla};
constexpr Shape kCsaIndex{4, true, 128, 64, false, DType::kBf16, KvFormat::kIndexFp8};
constexpr Shape kCsaIndexHadamard{4, true, 128, 64, true, DType::kBf16, KvFormat::kIndexMxfp4};
constexpr Shape kHca{128, false, 512, 64, false, DType::kBf16, KvFormat::kFp8DsMla};
constexpr Shape kHcaBf16{128, false, 512, 64, false, DType::kBf16, KvFormat::kBf16};
constexpr Shape kCsaExact{4, true, 512, 64, false, DType::kF32, KvFormat::kF32};
constexpr Shape kOddExact{3, false, 40, 6, false, DType::kF32, KvFormat::kF32};
constexpr Shape kOddOverlap{2, true, 24, 24, false, DType::kF32, KvFormat::kF32};

class CompressCases : public ::testing::TestWithParam<Shape> {
 protected:
  // Longer than two pooled windows, one shorter than the ratio, one that ends inside a window.
  std::vector<int64_t> lengths() const {
    const int64_t ratio = GetParam().ratio;
    return {3 * ratio + 1, ratio - 1, 2 * ratio, ratio + ratio / 2};
  }
};

TEST_P(CompressCases, MatchesDouble) {
  Compression compression(GetParam(), lengths());
  same_bytes_everywhere([&](Runner& runner) {
    compression.run(runner, 1 << 20);
    return compression.bytes();
  });
  compression.check_entries();
  compression.check_cache();
}

// 2.2 of the design: same bits however the prompt is cut, down to single tokens, with padding.
TEST_P(CompressCases, ChunksGiveTheSameBits) {
  Compression compression(GetParam(), lengths());
  Runner runner("portable", 1);
  compression.run(runner, 1 << 20);
  const std::vector<std::byte> whole = compression.bytes();
  const int64_t ratio = GetParam().ratio;
  for (int64_t chunk : std::set<int64_t>{1, 2, 3, ratio - 1, ratio, ratio + 1, 2 * ratio - 1}) {
    if (chunk < 1) continue;
    compression.run(runner, chunk, chunk % 2 == 0 ? 5 : 0);
    EXPECT_TRUE(compression.bytes() == whole) << "chunks of " << chunk;
  }
}

// A sequence alone gives the entries that it gives in a batch.
TEST_P(CompressCases, BatchDoesNotMatter) {
  Compression batch(GetParam(), lengths());
  Runner runner("portable", 1);
  batch.run(runner, 1 << 20);
  Compression alone(GetParam(), {lengths()[0]});
  alone.run(runner, 1 << 20);
  for (int64_t j = 0; j < lengths()[0] / GetParam().ratio; ++j)
    EXPECT_EQ(alone.entry(0, j), batch.entry(0, j)) << "entry " << j;
}

INSTANTIATE_TEST_SUITE_P(Shapes, CompressCases,
                         ::testing::Values(kCsa, kCsaIndex, kCsaIndexHadamard, kHca, kHcaBf16,
                                           kCsaExact, kOddExact, kOddOverlap));

}  // namespace
}  // namespace dsv4::cpu::testing
