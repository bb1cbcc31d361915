// The whole layer against the float64 oracle with the same quantisation points: every tap within
// the bounds that float arithmetic leaves, cache bytes as the oracle encodes them, selections, and
// the output end to end.
//
// Quantisation amplifies: a last-bit difference next to a rounding tie becomes a whole step of
// 2^-4 (E4M3). Taps are therefore compared with intervals (intervals.h) that hold every value a
// float implementation may reach: q, kv, compressed rows, index keys and scores from the layer's
// input; the attention from the tapped q and the cached rows; the output from the tapped heads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <ostream>

#include "tests/attention/intervals.h"
#include "tests/attention/layer_record.h"

namespace dsv4::testing {
namespace {

using oracle::Matrix;

// What is fed, and the queries that the oracle looks at: both ends of the sequence, of chunks,
// windows and entries.
struct Feed {
  std::vector<int64_t> chunks;
  int index_topk = 64;
  std::vector<int64_t> checked;
  int64_t num_tokens() const { return std::accumulate(chunks.begin(), chunks.end(), int64_t{0}); }
};

// Two chunks of prefill, single tokens across position 255 (which completes an entry of both
// ratios) and 259 (the 65th entry of ratio 4: from here on index_topk = 64 leaves some out), and a
// chunk on top.
const Feed& long_feed() {
  static const Feed feed = [] {
    Feed out;
    out.chunks = {140, 112, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 43};
    out.checked = {0, 1, 2, 3, 4, 7, 63, 126, 127, 128, 129, 139, 140, 141, 200, 251};
    for (int64_t p = 252; p < out.num_tokens(); p += p < 266 ? 1 : 3) out.checked.push_back(p);
    return out;
  }();
  return feed;
}

// The same for the executor, which takes a millisecond for what a GPU does in a microsecond: single
// tokens across position 127 (an entry of both ratios, the first full window), a selection of 16
// that leaves entries out from position 67 on.
const Feed& short_feed() {
  static const Feed feed{
      {70, 55, 1, 1, 1, 1, 1, 11}, 16, {0,  1,   2,   3,   4,   7,   63,  64,  66,  67,  69, 70,
                                        71, 100, 124, 125, 126, 127, 128, 129, 130, 131, 140}};
  return feed;
}

struct LayerCase {
  const char* name;
  Numerics numerics;
  oracle::Roundings roundings;
  int ratio, heads, groups;
  LayerTarget target = {};
  bool exact() const { return numerics.activation == DType::kF32; }
  const Feed& feed() const { return target.is_emulated() ? short_feed() : long_feed(); }
  ModelConfig config() const {
    ModelConfig out = small_config(heads, groups);
    out.index_topk = feed().index_topk;
    return out;
  }
};

void PrintTo(const LayerCase& which, std::ostream* out) {
  *out << which.target.backend << " " << which.name << " ratio " << which.ratio << ", "
       << which.heads << " heads";
}

std::vector<LayerCase> layer_cases() {
  const auto with = [](KvFormat format, oracle::CacheRounding rounding) {
    LayerCase out{"", kServing, oracle::kServing, 0, 4, 2};
    out.numerics.kv = format;
    out.roundings.cache = rounding;
    return out;
  };
  LayerCase bf16 = with(KvFormat::kBf16, oracle::CacheRounding::kBf16);
  LayerCase fp8 = with(KvFormat::kFp8, oracle::CacheRounding::kFp8);
  bf16.name = "serving_bf16";
  fp8.name = "serving_fp8";
  // Sums of FP8 tensor cores, which the oracle then forms, too.
  const auto on_fp8_cores = [](LayerCase which, const char* name) {
    which.name = name;
    which.numerics.products = Products::kFp8;
    which.roundings.fp8_products = true;
    return which;
  };
  std::vector<LayerCase> out;
  for (LayerCase which :
       {LayerCase{"serving", kServing, oracle::kServing, 0, 8, 2},
        LayerCase{"reference", kReference, oracle::kReference, 0, 8, 4},
        LayerCase{"exact", kExact, oracle::kExact, 0, 4, 2}, bf16, fp8,
        on_fp8_cores({"", kServing, oracle::kServing, 0, 8, 2}, "serving_fp8_products"),
        on_fp8_cores({"", kReference, oracle::kReference, 0, 8, 4}, "reference_fp8_products"),
        on_fp8_cores(bf16, "serving_bf16_fp8_products")}) {
    for (int ratio : {0, 4, 128}) {
      which.ratio = ratio;
      for (const LayerTarget& target : layer_targets()) {
        if (!unsupported(which.numerics, target.descriptor()).empty()) continue;
        which.target = target;
        out.push_back(which);
      }
    }
  }
  // What `serving` means on AMD, and the FP8 projection that it can do, too.
  LayerCase amd{"serving", kServing, oracle::kServing, 0, 4, 2, emulated_target()};
  amd.name = "serving_fp8_projection";
  out.push_back(amd);
  amd.name = "serving";
  amd.numerics.wo_a = WoA::kBf16;
  amd.roundings.output = oracle::OutputRounding::kBf16;
  for (int ratio : {0, 4, 128}) {
    amd.ratio = ratio;
    out.push_back(amd);
  }
  amd.name = "reference";
  amd.numerics = kReference;
  amd.roundings = oracle::kReference;
  amd.ratio = 4;
  out.push_back(amd);
  return out;
}

class LayerOracle : public ::testing::TestWithParam<LayerCase> {
 protected:
  void SetUp() override;
  void check_kv_and_q();
  void check_compressed();
  void check_selection();
  void check_attention();
  void check_output();
  void check_end_to_end();
  void check_without_taps();

  std::unique_ptr<LayerHarness> make_layer(const Numerics& numerics) const {
    return std::make_unique<LayerHarness>(which().config(), which().ratio, numerics,
                                          StepLimits{140, 1, 320}, TensorParallel{},
                                          which().target);
  }
  const LayerCase& which() const { return GetParam(); }
  int64_t num_tokens() const { return which().feed().num_tokens(); }
  const std::vector<int64_t>& checked_positions() const { return which().feed().checked; }
  DType act() const { return which().numerics.activation; }
  bool quantised_input() const { return which().numerics.quantise_linear_input; }
  /// `groups` products side by side, of quantised input or not.
  Interval multiply(const Interval& x, const oracle::Weight& w, bool quantised,
                    int groups = 1) const {
    return quantised && which().roundings.fp8_products ? interval_fp8_linear(x, w, groups)
                                                       : interval_linear(x, w, groups);
  }
  /// A linear at its place: input quantised when its weight is, output rounded to the activation.
  Interval project(const Interval& x, const oracle::Weight& w) const {
    Interval input = x;
    if (w.quantised && quantised_input()) interval_quantise(input, 128, 448, oracle::kLinearFloor);
    Interval out = multiply(input, w, w.quantised && quantised_input());
    interval_round(out, act());
    return out;
  }
  Matrix at_positions(const Matrix& all) const {
    Matrix out(static_cast<int64_t>(checked_positions().size()), all.cols);
    for (int64_t i = 0; i < out.rows; ++i) {
      std::ranges::copy(all.row(checked_positions()[static_cast<size_t>(i)]), out.row(i).begin());
    }
    return out;
  }
  /// qr at the checked positions: after q_norm.
  Interval low_rank_q() const {
    Interval out = project(Interval(at_positions(got_.x)), weights_.wq_a);
    for (int64_t i = 0; i < out.rows(); ++i) {
      interval_rms_norm(out, i, 0, out.cols(), weights_.q_norm.values, shape_.eps);
    }
    interval_round(out, act());
    return out;
  }
  /// Entries of a compressor on their way into a cache, rounded to the activation.
  Interval entries(const oracle::CompressorWeights& weights, int64_t width, bool hadamard) const;

  std::unique_ptr<LayerHarness> harness_;
  oracle::AttentionWeights weights_;
  oracle::AttentionShape shape_;
  std::vector<float> hidden_;
  LayerRecord got_;
};

void LayerOracle::SetUp() {
  if (const std::string reason = which().target.why_not(which().numerics.products);
      !reason.empty()) {
    GTEST_SKIP() << which().target.backend << ": " << reason;
  }
  const ModelConfig config = which().config();
  harness_ = make_layer(which().numerics);
  const LayerKind kind = harness_->layer().kind();
  const FormulaStorage storage =
      quantised_input() ? FormulaStorage::kReleased : FormulaStorage::kBf16Values;
  const auto source = formula_source(expected_attention_tensors(config, kind, "test."), 5, storage);
  weights_ = load_weights(*source, which().ratio);
  EXPECT_EQ(weights_.wkv.quantised, quantised_input());

  shape_.num_heads = which().heads;
  shape_.groups = which().groups;
  shape_.ratio = which().ratio;
  shape_.index_heads = config.index_n_heads;
  shape_.index_topk = config.index_topk;
  shape_.frequencies = oracle::rope_frequencies(
      {.theta = which().ratio == 0 ? 10000.0 : 160000.0, .yarn = which().ratio != 0}, 64);
  ASSERT_EQ(shape_.head_dim, config.head_dim);
  ASSERT_EQ(shape_.index_dim, config.index_head_dim);
  ASSERT_EQ(shape_.window, config.sliding_window);
  ASSERT_LT(shape_.index_topk, num_tokens() / 4 - 8)
      << "the indexer must have something to leave out";

  hidden_ = formula_hidden(num_tokens(), config.hidden_size, 11);
  got_.run(*harness_, hidden_, which().feed().chunks);
}

// What the radii of intervals may reach, root mean square against that of the values, or a
// comparison would say little: two roundings of bf16, and one of E4M3 or E2M1 where the path has
// such a one (in a few elements it is open which of two codes is right).
constexpr double kNarrowBf16 = 0x1p-7, kNarrowE4m3 = 0x1p-4, kNarrowE2m1 = 0x1p-2;

// Every element within its interval.
void expect_inside(const std::string& what, const Matrix& actual, const Interval& expected,
                   double narrow) {
  ASSERT_EQ(actual.rows, expected.rows()) << what;
  ASSERT_EQ(actual.cols, expected.cols()) << what;
  Comparison comparison(what + " [row, column]");
  double radii = 0, values = 0;
  for (int64_t r = 0; r < actual.rows; ++r) {
    for (int64_t c = 0; c < actual.cols; ++c) {
      const double middle = expected.middle(r, c), radius = expected.radius(r, c);
      comparison.add({r, c}, actual.row(r)[c], middle, radius * (1 + 1e-9));
      radii += radius * radius;
      values += middle * middle;
    }
  }
  EXPECT_TRUE(comparison.result());
  const double width = std::sqrt(radii / values);
  EXPECT_LE(width, narrow) << what << ": the bounds say too little";
}

void LayerOracle::check_kv_and_q() {
  Interval kv = project(Interval(got_.x), weights_.wkv);
  for (int64_t t = 0; t < num_tokens(); ++t) {
    interval_rms_norm(kv, t, 0, kv.cols(), weights_.kv_norm.values, shape_.eps);
  }
  interval_round(kv, act());
  for (int64_t t = 0; t < num_tokens(); ++t) {
    interval_rotate(kv, t, kv.cols(), shape_.frequencies, t);
  }
  interval_round(kv, act());
  expect_inside("kv", got_.kv, kv, kNarrowBf16);

  Interval q = project(low_rank_q(), weights_.wq_b);
  for (int64_t i = 0; i < q.rows(); ++i) {
    for (int64_t h = 0; h < shape_.num_heads; ++h) {
      const int64_t begin = h * shape_.head_dim, end = begin + shape_.head_dim;
      interval_rms_norm(q, i, begin, shape_.head_dim, {}, shape_.eps);
      interval_rotate(q, i, end, shape_.frequencies, checked_positions()[static_cast<size_t>(i)]);
    }
  }
  interval_round(q, act());
  expect_inside("q", at_positions(got_.q), q, kNarrowBf16);
}

Interval LayerOracle::entries(const oracle::CompressorWeights& weights, int64_t width,
                              bool hadamard) const {
  const Interval x(got_.x);
  const Interval v = interval_linear(x, weights.wkv);
  Interval s = interval_linear(x, weights.wgate);
  for (int64_t t = 0; t < num_tokens(); ++t) {
    for (int64_t c = 0; c < s.cols(); ++c) {
      s.lo.row(t)[c] += weights.ape.row(t % shape_.ratio)[c];
      s.hi.row(t)[c] += weights.ape.row(t % shape_.ratio)[c];
    }
  }
  Interval out = interval_pool(v, s, shape_.ratio, shape_.overlap(), width);
  for (int64_t j = 0; j < out.rows(); ++j) {
    interval_rms_norm(out, j, 0, width, weights.norm.values, shape_.eps);
    interval_rotate(out, j, width, shape_.frequencies, j * shape_.ratio);
    if (hadamard) interval_hadamard(out, j, 0, width);
  }
  interval_round(out, act());
  return out;
}

void LayerOracle::check_compressed() {
  if (which().ratio == 0) return;
  expect_inside("compressed", got_.compressed, entries(weights_.compressor, shape_.head_dim, false),
                kNarrowBf16);
}

void LayerOracle::check_selection() {
  if (which().ratio != 4) return;
  const bool hadamard = which().roundings.index_hadamard;
  const bool mxfp4 = which().roundings.index == oracle::IndexRounding::kMxfp4;
  const auto quantise = [&](Interval& x) {
    if (which().roundings.index == oracle::IndexRounding::kFp8) {
      interval_quantise(x, shape_.index_dim, 448, oracle::kIndexFloor);
    } else if (mxfp4) {
      interval_quantise(x, 32, 6, 6 * 0x1p-126);
    }
  };
  Interval keys = entries(weights_.indexer.compressor, shape_.index_dim, hadamard);
  quantise(keys);
  expect_inside("index keys", got_.index_rows, keys, mxfp4 ? kNarrowE2m1 : kNarrowE4m3);

  const Interval qr = low_rank_q();
  Interval q = project(qr, weights_.indexer.wq_b);
  for (int64_t i = 0; i < q.rows(); ++i) {
    for (int64_t h = 0; h < shape_.index_heads; ++h) {
      const int64_t begin = h * shape_.index_dim, end = begin + shape_.index_dim;
      interval_rotate(q, i, end, shape_.frequencies, checked_positions()[static_cast<size_t>(i)]);
      if (hadamard) interval_hadamard(q, i, begin, shape_.index_dim);
    }
  }
  interval_round(q, act());
  quantise(q);
  const Interval w = project(Interval(at_positions(got_.x)), weights_.indexer.weights_proj);

  // Against the keys as the cache holds them. A score sums products of three factors over heads and
  // dims; the constant factor and the scales of FP8 are products more.
  const double factor = 1.0 / std::sqrt(double{1} * shape_.index_heads * shape_.index_dim);
  const double float_error = gamma(shape_.index_dim + shape_.index_heads + 8.0);
  const bool e4m3_unit =  // which kernel computed the scores
      which().roundings.index == oracle::IndexRounding::kFp8 &&
      harness_->device().description().find("index_logits:sm90") != std::string::npos;
  const double unit_error = e4m3_unit ? e4m3_unit_bound(shape_.index_dim, 1) : 0;
  Matrix tapped(q.rows(), num_tokens() / 4);
  Interval scores(q.rows(), num_tokens() / 4);
  for (int64_t i = 0; i < q.rows(); ++i) {
    const int64_t position = checked_positions()[static_cast<size_t>(i)];
    for (int64_t j = 0; j < (position + 1) / 4; ++j) {
      const std::span<const double> key = std::as_const(got_.index_rows).row(j);
      double lo = 0, hi = 0, magnitude = 0;
      for (int64_t h = 0; h < shape_.index_heads; ++h) {
        double dot = 0, spread = 0, size = 0;
        for (int64_t d = 0; d < shape_.index_dim; ++d) {
          const int64_t c = h * shape_.index_dim + d;
          dot += q.middle(i, c) * key[d];
          spread += q.radius(i, c) * std::abs(key[d]);
          size += q.largest(i, c) * std::abs(key[d]);
        }
        const double least = std::max(0.0, dot - spread), most = std::max(0.0, dot + spread);
        const double w_lo = factor * w.lo.row(i)[h], w_hi = factor * w.hi.row(i)[h];
        lo += std::min(w_lo * least, w_lo * most);
        hi += std::max(w_hi * least, w_hi * most);
        magnitude += factor * w.largest(i, h) * size;
      }
      scores.lo.row(i)[j] = lo - (float_error + unit_error) * magnitude;
      scores.hi.row(i)[j] = hi + (float_error + unit_error) * magnitude;
      tapped.row(i)[j] = got_.scores.row(position)[j];
    }
  }
  // Radii of all dims add up in a score. With E2M1 after a Hadamard transform, which spreads every
  // doubt over all dims, they leave only the order of magnitude; check_end_to_end has more to say.
  // So does the worst case of the E4M3 matrix unit, which drops bits of every addend.
  expect_inside("index_scores", tapped, scores, mxfp4 || e4m3_unit ? 1.0 : 2 * kNarrowE4m3);

  // Selection is exact on the scores that the layer itself computed.
  for (int64_t t = 0; t < num_tokens(); ++t) {
    const auto visible = static_cast<size_t>((t + 1) / 4);
    ASSERT_EQ(got_.topk[static_cast<size_t>(t)],
              oracle::top_k(std::as_const(got_.scores).row(t).first(visible), shape_.index_topk))
        << "position " << t;
  }
}

// Steps 8 and 9 on the tapped q and the rows that the caches hold. Scores of rows are off by
// gamma(head_dim + 4) sum |q k|, probabilities by the exponential of that and by the float
// operations of the running maximum, one set per block of 64 rows (ReductionGrid); P may be rounded
// to bf16; sums round once per row.
void LayerOracle::check_attention() {
  Matrix tapped = at_positions(got_.o);
  Interval expected(tapped.rows, tapped.cols);
  const double scale = 1.0 / std::sqrt(static_cast<double>(shape_.head_dim));
  for (int64_t i = 0; i < expected.rows(); ++i) {
    const int64_t position = checked_positions()[static_cast<size_t>(i)];
    std::vector<std::span<const double>> rows;
    for (int64_t t = std::max<int64_t>(0, position - shape_.window + 1); t <= position; ++t) {
      rows.push_back(std::as_const(got_.window_rows).row(t));
    }
    if (which().ratio == 4) {
      for (int32_t j : got_.topk[static_cast<size_t>(position)]) {
        rows.push_back(std::as_const(got_.compressed_rows).row(j));
      }
    } else if (which().ratio != 0) {
      for (int64_t j = 0; j < (position + 1) / which().ratio; ++j) {
        rows.push_back(std::as_const(got_.compressed_rows).row(j));
      }
    }
    const double count = static_cast<double>(rows.size());
    for (int64_t h = 0; h < shape_.num_heads; ++h) {
      const int64_t begin = h * shape_.head_dim;
      const std::span<const double> q = std::as_const(got_.q).row(position).subspan(
          static_cast<size_t>(begin), static_cast<size_t>(shape_.head_dim));
      const oracle::Attended head =
          oracle::attend(q, rows, weights_.attn_sink.values[static_cast<size_t>(h)], scale);
      const double p_error =
          std::expm1((gamma(shape_.head_dim + 4.0) + 3 * kRoundoffF32) * head.max_z_abs) +
          gamma(8 + 10 * (6 + count / 64));
      const double p_rounding = which().numerics.round_p_to_bf16 ? kRoundoffBf16 : 0;
      for (int64_t d = 0; d < shape_.head_dim; ++d) {
        expected.set(i, begin + d, head.out[static_cast<size_t>(d)],
                     (2 * p_error + p_rounding + 2 * gamma(count + 4)) *
                         head.magnitude[static_cast<size_t>(d)]);
      }
    }
  }
  interval_round(expected, act());
  for (int64_t i = 0; i < expected.rows(); ++i) {
    for (int64_t h = 1; h <= shape_.num_heads; ++h) {
      interval_rotate(expected, i, h * shape_.head_dim, shape_.frequencies,
                      checked_positions()[static_cast<size_t>(i)], -1);
    }
  }
  if (which().numerics.wo_a == WoA::kFp8) {
    interval_quantise(expected, 128, 448, oracle::kInverseRopeFloor);
  } else {
    interval_round(expected, act());
  }
  expect_inside("attn_before_o", tapped, expected, kNarrowE4m3);
}

// Step 10 on the tapped heads, which hold the quantised values already.
void LayerOracle::check_output() {
  Interval z = multiply(Interval(at_positions(got_.o)), weights_.wo_a,
                        which().numerics.wo_a == WoA::kFp8, shape_.groups);
  interval_round(z, act());
  expect_inside("attn_out", at_positions(got_.out), project(z, weights_.wo_b), kNarrowE4m3);
}

double cosine_distance(std::span<const double> a, std::span<const double> b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return 1 - ab / std::sqrt(aa * bb);
}

// Selections of both sides agree but for scores within 1e-3 of the K-th (numerics.md 7). True: the
// same entries.
bool same_selection(const std::vector<int32_t>& actual, const std::vector<int32_t>& expected,
                    std::span<const double> scores, int64_t position) {
  if (actual == expected) return true;
  double last = std::numeric_limits<double>::infinity();  // the K-th score
  for (int32_t j : expected) last = std::min(last, scores[static_cast<size_t>(j)]);
  std::vector<int32_t> different;
  std::ranges::set_symmetric_difference(actual, expected, std::back_inserter(different));
  for (int32_t j : different) {
    EXPECT_NEAR(scores[static_cast<size_t>(j)], last, 1e-3 * std::abs(last))
        << "position " << position << ", entry " << j;
  }
  return false;
}

// Everything at once, from the layer's input to its output.
void LayerOracle::check_end_to_end() {
  const oracle::AttentionTrace trace =
      oracle::attention(got_.x, checked_positions(), weights_, shape_, which().roundings);
  const auto distance = [&](const LayerRecord& record) {
    oracle::Vector actual, expected, actual_scores, expected_scores;
    for (int64_t i = 0; i < trace.out.rows; ++i) {
      const int64_t position = checked_positions()[static_cast<size_t>(i)];
      if (which().ratio == 4) {
        const auto visible = static_cast<size_t>((position + 1) / 4);
        const std::span<const double> scores = trace.index_scores.row(i).first(visible);
        const std::span<const double> tapped = record.scores.row(position).first(visible);
        expected_scores.insert(expected_scores.end(), scores.begin(), scores.end());
        actual_scores.insert(actual_scores.end(), tapped.begin(), tapped.end());
        if (!same_selection(record.topk[static_cast<size_t>(position)],
                            trace.topk[static_cast<size_t>(i)], scores, position)) {
          continue;  // attends to other rows
        }
      }
      std::ranges::copy(trace.out.row(i), std::back_inserter(expected));
      std::ranges::copy(record.out.row(position), std::back_inserter(actual));
    }
    EXPECT_GE(expected.size(), trace.out.values.size() * 9 / 10) << "selections differ too often";
    if (which().ratio == 4) {
      EXPECT_LT(cosine_distance(actual_scores, expected_scores), 1e-4);
    }
    return cosine_distance(actual, expected);
  };

  if (which().exact()) {
    // Errors of sums are independent: sqrt(2048) u for the longest (a group of wo_a), in eight
    // stages 7.6e-6 of the result; half the square of it is the cosine distance.
    EXPECT_LT(distance(got_), 3e-11);
    return;
  }
  // The oracle does not round P. With that point left out on both sides, the acceptance of
  // numerics.md 7 holds. AMD's kernels always round.
  Numerics numerics = which().numerics;
  if (!which().target.is_emulated()) {
    numerics.round_p_to_bf16 = false;
    const auto layer = make_layer(numerics);
    LayerRecord unrounded;
    unrounded.run(*layer, hidden_, which().feed().chunks);
    EXPECT_LT(distance(unrounded), 1e-4);
  }
  // Rounding P changes the heads by at most 2^-8 / sqrt(3), root mean square. A quantiser of step s
  // turns a change d into a whole step with probability |d| / s: a mean square of |d| s, and s is
  // at most 2^-3 of the value in E4M3. That happens at the input of wo_b, and of wo_a if quantised.
  double change = 0x1p-8 / std::sqrt(3.0);
  if (numerics.wo_a == WoA::kFp8) change = std::sqrt(change * 0x1p-3);
  EXPECT_LT(distance(got_), change * 0x1p-3 / 2);
}

// Taps look at a step and change nothing, although they make the indexer run where it need not.
void LayerOracle::check_without_taps() {
  const SequenceId sequence = harness_->pool().create().value();
  std::vector<float> out;
  auto begin = hidden_.begin();
  for (int64_t tokens : which().feed().chunks) {
    const auto end = begin + tokens * got_.x.cols;
    const std::vector<float> step = harness_->forward(sequence, {begin, end});
    out.insert(out.end(), step.begin(), step.end());
    begin = end;
  }
  EXPECT_TRUE(std::ranges::equal(out, got_.out.values));
}

TEST_P(LayerOracle, Agrees) {
  check_kv_and_q();
  check_compressed();
  check_selection();
  check_attention();
  check_output();
  check_end_to_end();
  check_without_taps();
}

INSTANTIATE_TEST_SUITE_P(Cases, LayerOracle, ::testing::ValuesIn(layer_cases()),
                         [](const ::testing::TestParamInfo<LayerCase>& info) {
                           return info.param.target.label() + "_" + info.param.name + "_" +
                                  (info.param.ratio == 0   ? "sliding"
                                   : info.param.ratio == 4 ? "csa"
                                                           : "hca");
                         });

}  // namespace
}  // namespace dsv4::testing
