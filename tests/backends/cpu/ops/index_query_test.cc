// Indexer queries: rotation against double, quantisation bit for bit against the scalar rules.
#include "cache/kv_format.h"
#include "tests/backends/cpu/ops/rowwise_testing.h"

namespace dsv4::cpu::testing {
namespace {

constexpr int64_t kTokens = 5, kHeads = 8, kDim = 128;
constexpr int32_t kRopeDim = 64;
constexpr int32_t kPositions[kTokens] = {0, 3, 1000, 65536, 1048575};

struct Result {
  Storage q, weights;
};

class IndexQuery : public ::testing::Test {
 protected:
  IndexQuery() {
    for (int i = 0; i < kRopeDim / 2; ++i)
      frequencies_.push_back(static_cast<float>(std::pow(160000.0, -2.0 * i / kRopeDim)));
    std::vector<float> values = random_floats(kTokens * kHeads * kDim, 1);
    std::fill_n(values.begin(), kDim, 0.0f);  // a head of zeros
    for (int i = 0; i < kDim; ++i) values[static_cast<size_t>(kDim + i)] *= 1e-6f;  // below 1e-4
    values[2 * kDim] = 1e4f;                                                        // an outlier
    q_ = Storage(DType::kBf16, values);
    q32_ = Storage(DType::kF32, values);
    weights_ = Storage(DType::kBf16, random_floats(kTokens * kHeads, 2));
  }

  Result run(KvFormat format, bool hadamard) {
    Storage& q = format == KvFormat::kIndexF32 ? q32_ : q_;
    const auto bytes = same_bytes_everywhere([&](Runner& runner) {
      Result out{Storage(q.dtype, kTokens * kHeads * kDim), Storage(DType::kF32, kTokens * kHeads)};
      runner.ops().index_query({.q = q.view({kTokens, kHeads, kDim}),
                                .weights = weights_.view({kTokens, kHeads}),
                                .rope = {frequencies_.data(), kRopeDim},
                                .positions = kPositions,
                                .format = format,
                                .hadamard = hadamard,
                                .q_out = out.q.view({kTokens, kHeads, kDim}),
                                .weights_out = out.weights.view({kTokens, kHeads})},
                               runner.context());
      return bytes_of({&out.q, &out.weights});
    });
    size_t at = 0;
    Result out;
    out.q = read(bytes, at, q.dtype, kTokens * kHeads * kDim);
    out.weights = read(bytes, at, DType::kF32, kTokens * kHeads);
    return out;
  }

  // The rotated head in double, and the magnitude of each pair.
  std::vector<double> rotated(int64_t row, std::vector<double>& size) const {
    std::vector<double> out(kDim);
    size.resize(kDim);
    for (int64_t i = 0; i < kDim; ++i) {
      out[static_cast<size_t>(i)] = q_[row * kDim + i];
      size[static_cast<size_t>(i)] = std::fabs(out[static_cast<size_t>(i)]);
    }
    for (size_t i = 0; i < kRopeDim / 2; ++i) {
      const size_t a = kDim - kRopeDim + 2 * i;
      const auto angle =
          static_cast<double>(static_cast<float>(kPositions[row / kHeads]) * frequencies_[i]);
      const double x = out[a], y = out[a + 1];
      out[a] = x * std::cos(angle) - y * std::sin(angle);
      out[a + 1] = y * std::cos(angle) + x * std::sin(angle);
      size[a] = size[a + 1] = std::hypot(x, y);
    }
    return out;
  }

  // compressor.md 2.4: w * s_q * dim^-0.5 * heads^-0.5 in this order, in f32.
  float folded(int64_t row, float scale) const {
    return weights_[row] * scale * static_cast<float>(1 / std::sqrt(double{kDim})) *
           static_cast<float>(1 / std::sqrt(double{kHeads}));
  }

  std::vector<float> frequencies_;
  Storage q_, q32_, weights_;
};

TEST_F(IndexQuery, ExactRotates) {
  // Values are the bf16 ones, so that `rotated` serves both.
  for (int64_t i = 0; i < kTokens * kHeads * kDim; ++i)
    reinterpret_cast<float*>(q32_.bytes.data())[i] = q_[i];
  const Result result = run(KvFormat::kIndexF32, false);
  for (int64_t row = 0; row < kTokens * kHeads; ++row) {
    std::vector<double> size;
    const std::vector<double> expected = rotated(row, size);
    for (int64_t i = 0; i < kDim; ++i) {
      ASSERT_NEAR(result.q[row * kDim + i], expected[static_cast<size_t>(i)],
                  5 * kF32Eps * size[static_cast<size_t>(i)]);
    }
    EXPECT_EQ(result.weights[row], folded(row, 1.0f));
  }
}

TEST_F(IndexQuery, HadamardKeepsTheNormAndMixes) {
  for (int64_t i = 0; i < kTokens * kHeads * kDim; ++i)
    reinterpret_cast<float*>(q32_.bytes.data())[i] = q_[i];
  const Result result = run(KvFormat::kIndexF32, true);
  for (int64_t row = 0; row < kTokens * kHeads; ++row) {
    std::vector<double> size;
    const std::vector<double> x = rotated(row, size);
    double magnitude = 0;
    for (double value : size) magnitude += value;
    for (size_t i = 0; i < kDim; ++i) {
      double expected = 0;
      for (size_t k = 0; k < kDim; ++k) expected += (std::popcount(i & k) % 2 == 0 ? 1 : -1) * x[k];
      // Rotation 5, seven levels of sums and the factor: relative to the sum of magnitudes.
      ASSERT_NEAR(result.q[row * kDim + static_cast<int64_t>(i)],
                  expected / std::sqrt(double{kDim}),
                  magnitude / std::sqrt(double{kDim}) * 14 * kF32Eps);
    }
  }
}

// Takes the operation's own f32 result (exact mode, checked above), rounds it to bf16, quantises by
// the scalar rules: codes and folded weights must be equal.
TEST_F(IndexQuery, Fp8IsTheScalarRule) {
  for (int64_t i = 0; i < kTokens * kHeads * kDim; ++i)
    reinterpret_cast<float*>(q32_.bytes.data())[i] = q_[i];
  for (bool hadamard : {false, true}) {
    const Result exact = run(KvFormat::kIndexF32, hadamard);
    const Result result = run(KvFormat::kIndexFp8, hadamard);
    for (int64_t row = 0; row < kTokens * kHeads; ++row) {
      float amax = 1e-4f;
      for (int64_t i = 0; i < kDim; ++i)
        amax = std::max(amax, std::fabs(round_bf16(exact.q[row * kDim + i])));
      const int exponent = ceil_log2_ratio(amax, kE4m3Max);
      for (int64_t i = 0; i < kDim; ++i) {
        const uint8_t code = f32_to_e4m3(round_bf16(exact.q[row * kDim + i]) * exp2_int(-exponent));
        ASSERT_EQ(result.q[row * kDim + i], e4m3_to_f32(code)) << "row " << row << " element " << i;
      }
      EXPECT_EQ(result.weights[row], folded(row, exp2_int(exponent)));
    }
  }
}

TEST_F(IndexQuery, Mxfp4IsTheScalarRule) {
  for (int64_t i = 0; i < kTokens * kHeads * kDim; ++i)
    reinterpret_cast<float*>(q32_.bytes.data())[i] = q_[i];
  for (bool hadamard : {false, true}) {
    const Result exact = run(KvFormat::kIndexF32, hadamard);
    const Result result = run(KvFormat::kIndexMxfp4, hadamard);
    for (int64_t block = 0; block < kTokens * kHeads * kDim / 32; ++block) {
      float amax = 6 * 0x1p-126f;
      for (int64_t i = 0; i < 32; ++i)
        amax = std::max(amax, std::fabs(round_bf16(exact.q[block * 32 + i])));
      const int exponent = ceil_log2_ratio(amax, kE2m1Max);
      for (int64_t i = 0; i < 32; ++i) {
        const uint8_t code = f32_to_e2m1(round_bf16(exact.q[block * 32 + i]) * exp2_int(-exponent));
        ASSERT_EQ(result.q[block * 32 + i], e2m1_to_f32(code) * exp2_int(exponent))
            << "block " << block << " element " << i;
      }
    }
    for (int64_t row = 0; row < kTokens * kHeads; ++row)
      EXPECT_EQ(result.weights[row], folded(row, 1.0f));
  }
}

// All ties of both grids, reached through a head without rotation (position 0).
TEST_F(IndexQuery, TiesGoToEven) {
  const float e2m1[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f, 6.0f};
  const float expected4[] = {0.0f, 1.0f, 1.0f, 2.0f, 2.0f, 4.0f, 4.0f, 6.0f};
  std::vector<float> values(kTokens * kHeads * kDim, 0.0f);
  std::copy_n(e2m1, 8, values.begin());
  for (int i = 0; i < 8; ++i) values[static_cast<size_t>(8 + i)] = -e2m1[i];
  q_ = Storage(DType::kBf16, values);
  Result result = run(KvFormat::kIndexMxfp4, false);
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(result.q[i], expected4[i]);
    EXPECT_EQ(result.q[8 + i], -expected4[i]);
  }
  // amax 448: scale 1. Subnormal ties of numerics.md 5, a normal one (400), the largest.
  const float e4m3[] = {448.0f, 400.0f, 0x1p-10f, 3 * 0x1p-10f, 0x1p-9f, 17.0f, 19.0f, 0x1.ep-7f};
  const float expected8[] = {448.0f, 384.0f, 0.0f, 0x1p-8f, 0x1p-9f, 16.0f, 20.0f, 0x1p-6f};
  std::fill(values.begin(), values.end(), 0.0f);
  std::copy_n(e4m3, 8, values.begin());
  q_ = Storage(DType::kBf16, values);
  result = run(KvFormat::kIndexFp8, false);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(result.q[i], expected8[i]) << e4m3[i];
}

}  // namespace
}  // namespace dsv4::cpu::testing
