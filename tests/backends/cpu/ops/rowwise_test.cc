// Norms, rotations, embedding, routing, and the vector functions under them.
#include "backends/cpu/ops/rowwise_kernels.h"
#include "cache/kv_format.h"
#include "tests/backends/cpu/ops/rowwise_testing.h"

namespace dsv4::cpu::testing {
namespace {

const RowKernels* tables[] = {&kRowKernelsAvx512, &kRowKernelsAvx2, &kRowKernelsPortable};

// f(kernels) for every table that this machine runs.
template <typename F>
void for_each_table(F&& f) {
  for (size_t i = 0; i < rowwise_candidates().size(); ++i) {
    if (rowwise_candidates()[i].why_not().empty()) f(*tables[i]);
  }
}

double ulps(float value, double expected) {
  const auto rounded = static_cast<float>(std::fabs(expected));
  const double ulp = std::max(0x1p-149, static_cast<double>(std::nextafter(
                                            rounded, std::numeric_limits<float>::infinity())) -
                                            rounded);
  return std::fabs(value - expected) / ulp;
}

TEST(RowwiseFunctions, ExpIsAccurateOverTheWholeRange) {
  std::vector<float> x;
  for (float value = -110.0f; value < 90.0f; value += 0.00137f) x.push_back(value);
  for_each_table([&](const RowKernels& kernels) {
    std::vector<float> y = x;
    kernels.exp(y.data(), static_cast<int64_t>(y.size()));
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = std::exp(static_cast<double>(x[i]));
      if (expected > std::numeric_limits<float>::max()) {
        EXPECT_TRUE(std::isinf(y[i])) << x[i];
      } else {
        worst = std::max(worst, ulps(y[i], expected));
      }
    }
    EXPECT_LE(worst, 2.0);
  });
}

TEST(RowwiseFunctions, ExpOfSpecialValues) {
  for_each_table([&](const RowKernels& kernels) {
    const float infinity = std::numeric_limits<float>::infinity();
    float x[] = {-infinity, infinity, std::nanf(""), 0.0f, -1e30f, 1e30f};
    kernels.exp(x, 6);
    EXPECT_EQ(x[0], 0.0f);
    EXPECT_EQ(x[1], infinity);
    EXPECT_TRUE(std::isnan(x[2]));
    EXPECT_EQ(x[3], 1.0f);
    EXPECT_EQ(x[4], 0.0f);
    EXPECT_EQ(x[5], infinity);
  });
}

// Sigmoid: exp to 2 ulp, an addition and a division of half an ulp each: 2 * (1 - y) + 1 <= 3.
// sqrt(softplus): its argument to 2 (exp) + 3 (log1p) + 1 (sum) ulp, halved by the root, which
// rounds: 3.5, doubled where the ulp of the root is relatively half as large: 7.
TEST(RowwiseFunctions, SigmoidAndSoftplusAreAccurate) {
  std::vector<float> x;
  for (float value = -85.0f; value < 85.0f; value += 0.00113f) x.push_back(value);
  x.insert(x.end(), {20.0f, std::nextafter(20.0f, 30.0f), 0.0f, -0.0f, 1e-30f});
  for_each_table([&](const RowKernels& kernels) {
    std::vector<float> y = x, z(x.size());
    kernels.sigmoid(y.data(), static_cast<int64_t>(y.size()));
    kernels.sqrt_softplus(x.data(), static_cast<int64_t>(x.size()), z.data());
    double worst_sigmoid = 0, worst_softplus = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i];
      worst_sigmoid = std::max(worst_sigmoid, ulps(y[i], 1.0 / (1.0 + std::exp(-v))));
      const double softplus = v > 20 ? v : std::log1p(std::exp(v));
      worst_softplus = std::max(worst_softplus, ulps(z[i], std::sqrt(softplus)));
    }
    EXPECT_LE(worst_sigmoid, 3.0);
    EXPECT_LE(worst_softplus, 7.0);
  });
}

TEST(RowwiseFunctions, TablesAgreeBitForBit) {
  const std::vector<float> x = random_floats(1000, 1, 30.0f);
  std::vector<std::vector<float>> results;
  for_each_table([&](const RowKernels& kernels) {
    std::vector<float> out = x, more(x.size());
    kernels.exp(out.data(), 1000);
    kernels.sqrt_softplus(x.data(), 1000, more.data());
    out.insert(out.end(), more.begin(), more.end());
    kernels.swiglu(x.data(), x.data() + 500, 10.0f, 0.37f, 499, more.data(), DType::kF32);
    out.insert(out.end(), more.begin(), more.begin() + 499);
    results.push_back(out);
  });
  for (const auto& result : results)
    EXPECT_EQ(0, std::memcmp(result.data(), results[0].data(), result.size() * sizeof(float)));
}

// Every float rounds to bf16 like the scalar definition: all exponents, ties, NaN, infinities.
TEST(RowwiseFunctions, Bf16RoundingIsTheScalarOne) {
  std::vector<float> x;
  for (uint32_t high = 0; high < 0x10000; high += 7) {
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      x.push_back(std::bit_cast<float>(high << 16 | low));
  }
  for_each_table([&](const RowKernels& kernels) {
    std::vector<uint16_t> out(x.size());
    kernels.convert(x.data(), DType::kF32, static_cast<int64_t>(x.size()), out.data(),
                    DType::kBf16);
    for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(out[i], f32_to_bf16(x[i]));
  });
}

TEST(RmsNorm, MatchesDoubleForEveryTypeAndLength) {
  for (int64_t cols : {1, 15, 16, 64, 100, 512, 4096, 7168}) {
    for (DType act : {DType::kBf16, DType::kF32}) {
      for (DType weight_dtype : {DType::kBf16, DType::kF32}) {
        Storage x(act, random_floats(5 * cols, 3)), w(weight_dtype, random_floats(cols, 4));
        const auto bytes = same_bytes_everywhere([&](Runner& runner) {
          Storage out(act, 5 * cols);
          runner.ops().rms_norm({.x = x.view({5, cols}),
                                 .weight = w.view({cols}),
                                 .eps = 1e-6f,
                                 .out = out.view({5, cols})},
                                runner.context());
          return out.bytes;
        });
        size_t at = 0;
        const Storage out = read(bytes, at, act, 5 * cols);
        // Sum of n squares in f32: relative error n / 64 + 6 roundings (64 chains, then a tree),
        // halved by the root; then mean, eps, root, division and two products.
        const double relative = (static_cast<double>(cols) / 64 / 2 + 3 + 6) * kF32Eps +
                                (act == DType::kBf16 ? kBf16Eps : kF32Eps);
        for (int64_t t = 0; t < 5; ++t) {
          double sum = 0;
          for (int64_t i = 0; i < cols; ++i) sum += double{x[t * cols + i]} * x[t * cols + i];
          const double factor = 1 / std::sqrt(sum / static_cast<double>(cols) + 1e-6f);
          for (int64_t i = 0; i < cols; ++i) {
            const double expected = x[t * cols + i] * factor * w[i];
            ASSERT_NEAR(out[t * cols + i], expected, std::fabs(expected) * relative + 1e-38)
                << "token " << t << " column " << i << " of " << cols;
          }
        }
      }
    }
  }
}

TEST(RmsNorm, InPlaceAndStridedRows) {
  Storage x(DType::kBf16, random_floats(4 * 200, 5)), w(DType::kF32, random_floats(100, 6));
  same_bytes_everywhere([&](Runner& runner) {
    Storage separate(DType::kBf16, 4 * 100), in_place = x;
    Tensor strided = x.view({4, 100});
    strided.strides[0] = 200;
    runner.ops().rms_norm(
        {.x = strided, .weight = w.view({100}), .eps = 1e-6f, .out = separate.view({4, 100})},
        runner.context());
    strided.data = in_place.bytes.data();
    runner.ops().rms_norm({.x = strided, .weight = w.view({100}), .eps = 1e-6f, .out = strided},
                          runner.context());
    for (int64_t t = 0; t < 4; ++t) {
      for (int64_t i = 0; i < 200; ++i) {
        EXPECT_EQ(in_place[t * 200 + i], i < 100 ? separate[t * 100 + i] : x[t * 200 + i]);
      }
    }
    return in_place.bytes;
  });
}

std::vector<float> plain_frequencies(double base, int pairs) {
  std::vector<float> out;
  for (int i = 0; i < pairs; ++i)
    out.push_back(static_cast<float>(std::pow(base, -static_cast<double>(i) / pairs)));
  return out;
}

// Values of attention.md 3 with the fp32 frequency and product that implementations use: q = (1, 0)
// in the pair gives (cos, sin). A head without nope part: its norm factor is sqrt(64), as only one
// pair is set to (1, 0).
TEST(QnormRope, GoldenAngles) {
  struct Golden {
    int32_t position;
    int pair;
    double cos, sin;
  };
  constexpr Golden kGolden[] = {{1, 0, 0.54030231, 0.84147098},
                                {1000, 16, -0.83907153, -0.54402111},
                                {65536, 31, -0.77415868, 0.63299158}};
  const std::vector<float> frequencies = plain_frequencies(10000, 32);
  for (const Golden& golden : kGolden) {
    std::vector<float> head(64, 0.0f);
    head[static_cast<size_t>(2 * golden.pair)] = 1.0f;
    same_bytes_everywhere([&](Runner& runner) {
      Storage q(DType::kF32, head), kv(DType::kF32, head);
      const int64_t slot = -1;
      runner.ops().qnorm_rope_insert({.q = q.view({1, 1, 64}),
                                      .kv = kv.view({1, 64}),
                                      .rope = {frequencies.data(), 64},
                                      .eps = 0.0f,
                                      .positions = &golden.position,
                                      .slot_mapping = &slot,
                                      .window = {}},
                                     runner.context());
      // The table prints 8 digits; one ulp of f_31 would move the last row by 3e-6.
      EXPECT_NEAR(kv[2 * golden.pair], golden.cos, 1e-7);
      EXPECT_NEAR(kv[2 * golden.pair + 1], golden.sin, 1e-7);
      EXPECT_NEAR(q[2 * golden.pair], 8 * golden.cos, 8e-7);
      EXPECT_NEAR(q[2 * golden.pair + 1], 8 * golden.sin, 8e-7);
      return kv.bytes;
    });
  }
}

TEST(InverseRope, GoldenQuarterTurn) {
  // (3, 4) with cos 0, sin 1 -> (4, -3). The angle pi/2 in f32: cos is -4.4e-8.
  const float frequency = static_cast<float>(M_PI / 2);
  const int32_t position = 1;
  same_bytes_everywhere([&](Runner& runner) {
    Storage o(DType::kF32, {3.0f, 4.0f}), out(DType::kF32, 2);
    runner.ops().inverse_rope({.o = o.view({1, 1, 2}),
                               .rope = {&frequency, 2},
                               .positions = &position,
                               .quantise = false,
                               .out = out.view({1, 1, 2})},
                              runner.context());
    EXPECT_NEAR(out[0], 4.0f, 4e-7);
    EXPECT_NEAR(out[1], -3.0f, 4e-7);
    return out.bytes;
  });
}

struct RopeCase {
  DType act;
  int64_t tokens, heads, head_dim;
  int32_t rope_dim;
};

void PrintTo(const RopeCase& value, std::ostream* out) {
  *out << (value.act == DType::kBf16 ? "bf16" : "f32") << " [" << value.tokens << ", "
       << value.heads << ", " << value.head_dim << "], rope_dim " << value.rope_dim;
}

class QnormRopeCases : public ::testing::TestWithParam<RopeCase> {};

std::vector<int32_t> some_positions(int64_t tokens) {
  constexpr int32_t kPositions[] = {0, 1, 127, 4095, 65536, 1048575};
  std::vector<int32_t> out;
  for (int64_t t = 0; t < tokens; ++t) out.push_back(kPositions[t % 6]);
  return out;
}

// Rotates a row of doubles; angles as specified, in f32.
void rotate(std::vector<double>& row, const std::vector<float>& frequencies, int32_t position,
            double direction) {
  const size_t nope = row.size() - 2 * frequencies.size();
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double angle = static_cast<double>(static_cast<float>(position) * frequencies[i]);
    const double c = std::cos(angle), s = direction * std::sin(angle);
    const double a = row[nope + 2 * i], b = row[nope + 2 * i + 1];
    row[nope + 2 * i] = a * c - b * s;
    row[nope + 2 * i + 1] = b * c + a * s;
  }
}

TEST_P(QnormRopeCases, MatchesDoubleAndWritesTheCache) {
  const DType act = GetParam().act;
  const int64_t tokens = GetParam().tokens, heads = GetParam().heads;
  const int64_t head_dim = GetParam().head_dim;
  const int32_t rope_dim = GetParam().rope_dim;
  const std::vector<float> frequencies = plain_frequencies(160000, rope_dim / 2);
  const std::vector<int32_t> positions = some_positions(tokens);
  const Storage q0(act, random_floats(tokens * heads * head_dim, 7));
  const Storage kv0(act, random_floats(tokens * head_dim, 8));
  std::vector<int64_t> slots;
  for (int64_t t = 0; t < tokens; ++t) slots.push_back(t == 1 ? -1 : 3 * t + 1);
  const int64_t rows = 3 * tokens + 2;
  const KvFormat format = act == DType::kBf16 ? KvFormat::kBf16 : KvFormat::kF32;
  const int64_t cache_bytes = page_bytes(format, rows, static_cast<int>(head_dim));

  const auto bytes = same_bytes_everywhere([&](Runner& runner) {
    Storage q = q0, kv = kv0;
    std::vector<std::byte> cache(static_cast<size_t>(cache_bytes), std::byte{0x11});
    runner.ops().qnorm_rope_insert(
        {.q = q.view({tokens, heads, head_dim}),
         .kv = kv.view({tokens, head_dim}),
         .rope = {frequencies.data(), rope_dim},
         .eps = 1e-6f,
         .positions = positions.data(),
         .slot_mapping = slots.data(),
         .window = {cache.data(), cache_bytes, 1, static_cast<int32_t>(rows), format,
                    static_cast<int32_t>(head_dim)}},
        runner.context());
    // The cache holds exactly the rounded rows; other slots are untouched.
    const int64_t row_bytes = head_dim * size_of(act);
    for (int64_t row = 0; row < rows; ++row) {
      const auto* at = cache.data() + row * row_bytes;
      const bool written = row % 3 == 1 && row / 3 != 1 && row / 3 < tokens;
      if (written) {
        EXPECT_EQ(0, std::memcmp(at, kv.bytes.data() + row / 3 * row_bytes,
                                 static_cast<size_t>(row_bytes)));
      } else {
        EXPECT_TRUE(
            std::all_of(at, at + row_bytes, [](std::byte b) { return b == std::byte{0x11}; }));
      }
    }
    return bytes_of({&q, &kv});
  });
  size_t at = 0;
  const Storage q = read(bytes, at, act, tokens * heads * head_dim);
  const Storage kv = read(bytes, at, act, tokens * head_dim);
  const double rounding = act == DType::kBf16 ? kBf16Eps : kF32Eps;
  const auto check = [&](const Storage& in, const Storage& out, int64_t row, int32_t position,
                         bool norm) {
    std::vector<double> expected;
    double sum = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      expected.push_back(in[row * head_dim + i]);
      sum += expected.back() * expected.back();
    }
    if (norm) {
      for (double& value : expected)
        value /= std::sqrt(sum / static_cast<double>(head_dim) + 1e-6f);
    }
    const std::vector<double> before = expected;
    rotate(expected, frequencies, position, 1);
    for (int64_t i = 0; i < head_dim; ++i) {
      // Norm: head_dim / 64 + 12 roundings; rotation: cos and sin, two products and a sum, relative
      // to the pair's magnitude.
      const auto pair = static_cast<size_t>(i / 2 * 2);
      const double size = std::hypot(before[pair], before[std::min(pair + 1, before.size() - 1)]);
      const double bound = size * (static_cast<double>(head_dim) / 64 + 12 + 4) * kF32Eps +
                           std::fabs(expected[static_cast<size_t>(i)]) * rounding;
      ASSERT_NEAR(out[row * head_dim + i], expected[static_cast<size_t>(i)], bound)
          << "row " << row << " element " << i;
    }
  };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h)
      check(q0, q, t * heads + h, positions[static_cast<size_t>(t)], true);
    check(kv0, kv, t, positions[static_cast<size_t>(t)], false);
  }
}

TEST_P(QnormRopeCases, InverseUndoesTheRotation) {
  const DType act = GetParam().act;
  const int64_t tokens = GetParam().tokens, heads = GetParam().heads;
  const int64_t head_dim = GetParam().head_dim;
  const int32_t rope_dim = GetParam().rope_dim;
  const std::vector<float> frequencies = plain_frequencies(10000, rope_dim / 2);
  const std::vector<int32_t> positions = some_positions(tokens);
  Storage o(act, random_floats(tokens * heads * head_dim, 9, 3.0f));
  const auto bytes = same_bytes_everywhere([&](Runner& runner) {
    Storage out(act, tokens * heads * head_dim);
    runner.ops().inverse_rope({.o = o.view({tokens, heads, head_dim}),
                               .rope = {frequencies.data(), rope_dim},
                               .positions = positions.data(),
                               .quantise = false,
                               .out = out.view({tokens, heads, head_dim})},
                              runner.context());
    return out.bytes;
  });
  size_t at = 0;
  const Storage out = read(bytes, at, act, tokens * heads * head_dim);
  for (int64_t row = 0; row < tokens * heads; ++row) {
    std::vector<double> expected;
    for (int64_t i = 0; i < head_dim; ++i) expected.push_back(o[row * head_dim + i]);
    const std::vector<double> before = expected;
    rotate(expected, frequencies, positions[static_cast<size_t>(row / heads)], -1);
    for (int64_t i = 0; i < head_dim; ++i) {
      const auto pair = static_cast<size_t>(i / 2 * 2);
      const double bound =
          std::hypot(before[pair], before[std::min(pair + 1, before.size() - 1)]) * 4 * kF32Eps +
          std::fabs(expected[static_cast<size_t>(i)]) * (act == DType::kBf16 ? kBf16Eps : kF32Eps);
      ASSERT_NEAR(out[row * head_dim + i], expected[static_cast<size_t>(i)], bound);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, QnormRopeCases,
                         ::testing::Values(RopeCase{DType::kBf16, 1, 64, 512, 64},
                                           RopeCase{DType::kBf16, 7, 3, 512, 64},
                                           RopeCase{DType::kF32, 5, 2, 512, 64},
                                           RopeCase{DType::kBf16, 6, 2, 40, 24},
                                           RopeCase{DType::kF32, 3, 1, 18, 6}));

// o_proj.md 4: floor 1e-10, groups of 128, from the f32 values; the result is code * scale, exact.
TEST(InverseRope, QuantisedGroupsMatchTheScalarRule) {
  constexpr int64_t kTokens = 3, kHeads = 2, kDim = 512;
  const std::vector<float> frequencies = plain_frequencies(160000, 32);
  const int32_t positions[kTokens] = {0, 77, 5000};
  std::vector<float> values = random_floats(kTokens * kHeads * kDim, 10);
  std::fill_n(values.begin(), 128, 0.0f);                                    // a zero group
  for (int i = 128; i < 256; ++i) values[static_cast<size_t>(i)] *= 1e-13f;  // below the floor
  for (int i = 256; i < 384; ++i) values[static_cast<size_t>(i)] *= 1e30f;
  values[600] = 448.0f;
  Storage o(DType::kBf16, values);
  const auto bytes = same_bytes_everywhere([&](Runner& runner) {
    Storage rotated(DType::kF32, kTokens * kHeads * kDim),
        out(DType::kBf16, kTokens * kHeads * kDim);
    const RopeView rope{frequencies.data(), 64};
    Tensor o_view = o.view({kTokens, kHeads, kDim});
    runner.ops().inverse_rope({.o = o_view,
                               .rope = rope,
                               .positions = positions,
                               .quantise = false,
                               .out = rotated.view({kTokens, kHeads, kDim})},
                              runner.context());
    runner.ops().inverse_rope({.o = o_view,
                               .rope = rope,
                               .positions = positions,
                               .quantise = true,
                               .out = out.view({kTokens, kHeads, kDim})},
                              runner.context());
    return bytes_of({&rotated, &out});
  });
  size_t at = 0;
  const Storage rotated = read(bytes, at, DType::kF32, kTokens * kHeads * kDim);
  const Storage out = read(bytes, at, DType::kBf16, kTokens * kHeads * kDim);
  for (int64_t group = 0; group < kTokens * kHeads * 4; ++group) {
    float amax = 1e-10f;
    for (int64_t i = 0; i < 128; ++i) amax = std::max(amax, std::fabs(rotated[group * 128 + i]));
    const int exponent = ceil_log2_ratio(amax, 448.0f);
    for (int64_t i = 0; i < 128; ++i) {
      const uint8_t code = f32_to_e4m3(rotated[group * 128 + i] * exp2_int(-exponent));
      ASSERT_EQ(out[group * 128 + i], e4m3_to_f32(code) * exp2_int(exponent))
          << "group " << group << " element " << i;
    }
  }
}

TEST(InverseRope, NanStaysVisibleInItsGroup) {
  const float frequency = 1.0f;
  const int32_t position = 3;
  std::vector<float> values = random_floats(256, 11);
  values[5] = std::nanf("");
  Storage o(DType::kBf16, values);
  same_bytes_everywhere([&](Runner& runner) {
    Storage out(DType::kBf16, 256);
    runner.ops().inverse_rope({.o = o.view({1, 1, 256}),
                               .rope = {&frequency, 2},
                               .positions = &position,
                               .quantise = true,
                               .out = out.view({1, 1, 256})},
                              runner.context());
    for (int64_t i = 0; i < 256; ++i) EXPECT_EQ(std::isnan(out[i]), i < 128) << i;
    return std::vector<std::byte>{};
  });
}

TEST(Embed, CopiesTheRowToEveryStream) {
  const int32_t ids[] = {3, 0, 3, 6};
  for (DType act : {DType::kBf16, DType::kF32}) {
    Storage table(DType::kBf16, random_floats(7 * 33, 12));
    same_bytes_everywhere([&](Runner& runner) {
      Storage streams(act, 4 * 4 * 33);
      runner.ops().embed(
          {.ids = ids, .table = table.view({7, 33}), .streams = streams.view({4, 4, 33})},
          runner.context());
      for (int64_t i = 0; i < 4 * 4 * 33; ++i)
        EXPECT_EQ(streams[i], table[ids[i / (4 * 33)] * 33 + i % 33]);
      return streams.bytes;
    });
  }
}

TEST(GatherRows, CopiesRows) {
  Storage x(DType::kBf16, random_floats(9 * 21, 13));
  const int32_t rows[] = {8, 0, 0, 5};
  Runner runner("portable", 2);
  Storage out(DType::kBf16, 4 * 21);
  runner.ops().gather_rows({.x = x.view({9, 21}), .rows = rows, .out = out.view({4, 21})},
                           runner.context());
  for (int64_t i = 0; i < 4 * 21; ++i) EXPECT_EQ(out[i], x[rows[i / 21] * 21 + i % 21]);
}

struct Routed {
  std::vector<int32_t> ids;
  Storage weights;
};

Routed route_all(Storage& logits, int64_t tokens, int64_t experts, int64_t k, Storage* bias,
                 std::vector<int64_t>* table, const std::vector<int32_t>& token_ids) {
  Routed out;
  same_bytes_everywhere([&](Runner& runner) {
    out.ids.assign(static_cast<size_t>(tokens * k), -7);
    out.weights = Storage(DType::kF32, tokens * k);
    RouteParams params{.logits = logits.view({tokens, experts}),
                       .bias = {},
                       .tid2eid = {},
                       .token_ids = token_ids.data(),
                       .scaling = 1.5f,
                       .expert_ids = Tensor(out.ids.data(), DType::kI32, {tokens, k}),
                       .expert_weights = out.weights.view({tokens, k})};
    if (bias != nullptr) params.bias = bias->view({experts});
    if (table != nullptr) {
      params.tid2eid =
          ConstTensor(table->data(), DType::kI64, {static_cast<int64_t>(table->size()) / k, k});
    }
    runner.ops().route(params, runner.context());
    Storage ids(DType::kI32, tokens * k);
    std::memcpy(ids.bytes.data(), out.ids.data(), ids.bytes.size());
    return bytes_of({&out.weights, &ids});
  });
  return out;
}

TEST(Route, PicksTheLargestAndNormalises) {
  constexpr int64_t kTokens = 37, kExperts = 256, kTop = 6;
  Storage logits(DType::kF32, random_floats(kTokens * kExperts, 14, 3.0f));
  Storage bias(DType::kF32, random_floats(kExperts, 15, 0.3f));
  const Routed routed = route_all(logits, kTokens, kExperts, kTop, &bias, nullptr, {});
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<std::pair<double, int32_t>> scores;
    std::vector<double> p;
    for (int32_t e = 0; e < kExperts; ++e) {
      const double x = logits[t * kExperts + e];
      p.push_back(std::sqrt(x > 20 ? x : std::log1p(std::exp(x))));
      scores.emplace_back(-(p.back() + bias[e]), e);
    }
    std::sort(scores.begin(), scores.end());
    std::vector<int32_t> expected;
    double sum = 0;
    for (int i = 0; i < kTop; ++i) {
      expected.push_back(scores[static_cast<size_t>(i)].second);
      sum += p[static_cast<size_t>(expected.back())];
    }
    std::sort(expected.begin(), expected.end());
    for (int64_t i = 0; i < kTop; ++i) {
      ASSERT_EQ(routed.ids[static_cast<size_t>(t * kTop + i)], expected[static_cast<size_t>(i)]);
      const double weight = p[static_cast<size_t>(expected[static_cast<size_t>(i)])] / sum * 1.5;
      // Scores to 7 ulp = 14 half ulps on both sides of the quotient, 5 additions, 2 roundings.
      EXPECT_NEAR(routed.weights[t * kTop + i], weight, weight * (2 * 14 + 7) * kF32Eps);
    }
  }
}

TEST(Route, TiesGoToTheSmallerIdAndNanIsLast) {
  Storage logits(DType::kF32, std::vector<float>{1, 5, 5, 5, std::nanf(""), 5, 0, 5});
  Storage bias(DType::kF32, std::vector<float>(8, 0.0f));
  EXPECT_EQ(route_all(logits, 1, 8, 3, &bias, nullptr, {}).ids, (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(route_all(logits, 1, 8, 7, &bias, nullptr, {}).ids,
            (std::vector<int32_t>{0, 1, 2, 3, 5, 6, 7}));
}

// A later, better expert pushes out the largest of equal ids, not the smallest.
TEST(Route, TiesSurviveALateWinner) {
  Storage logits(DType::kF32, std::vector<float>{5, 5, 5, 9});
  Storage bias(DType::kF32, std::vector<float>(4, 0.0f));
  EXPECT_EQ(route_all(logits, 1, 4, 2, &bias, nullptr, {}).ids, (std::vector<int32_t>{0, 3}));
  EXPECT_EQ(route_all(logits, 1, 4, 3, &bias, nullptr, {}).ids, (std::vector<int32_t>{0, 1, 3}));
}

TEST(Route, BiasSelectsButDoesNotWeigh) {
  Storage logits(DType::kF32, std::vector<float>{0, 0, 0, 0});
  Storage bias(DType::kF32, std::vector<float>{0, 9, -9, 3});
  const Routed routed = route_all(logits, 1, 4, 2, &bias, nullptr, {});
  EXPECT_EQ(routed.ids, (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(routed.weights[0], 0.75f);
  EXPECT_EQ(routed.weights[1], 0.75f);
}

TEST(Route, TableRoutesByToken) {
  Storage logits(DType::kF32, random_floats(3 * 8, 16));
  std::vector<int64_t> table{7, 2, 0, 1, 5, 3};
  const Routed routed = route_all(logits, 3, 8, 2, nullptr, &table, {2, 0, 1});
  EXPECT_EQ(routed.ids, (std::vector<int32_t>{3, 5, 2, 7, 0, 1}));
  table[4] = 8;
  EXPECT_THROW(
      {
        Runner runner("portable", 1);
        std::vector<int32_t> ids(2);
        Storage weights(DType::kF32, 2);
        const int32_t token = 2;
        runner.ops().route({.logits = logits.view({1, 8}),
                            .bias = {},
                            .tid2eid = ConstTensor(table.data(), DType::kI64, {3, 2}),
                            .token_ids = &token,
                            .scaling = 1.0f,
                            .expert_ids = Tensor(ids.data(), DType::kI32, {1, 2}),
                            .expert_weights = weights.view({1, 2})},
                           runner.context());
      },
      Error);
}

}  // namespace
}  // namespace dsv4::cpu::testing
