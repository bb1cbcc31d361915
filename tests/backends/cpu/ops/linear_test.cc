// linear: every candidate gives the bits of the scalar definition, for every shape, format, number
// of threads and stride; and the definition is close to a plain double loop, within a derived
// bound.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/candidates.h"
#include "backends/cpu/ops/fp8_tables.h"
#include "core/numbers.h"
#include "core/thread_pool.h"

namespace dsv4::cpu {
namespace {

// ---- problems made of random bytes

struct Format {
  DType dtype;
  int block_rows = 128;
  int block_cols = 128;
};

struct Case {
  DType x = DType::kBf16;
  Format w{DType::kF8E4M3};
  int64_t m = 1, n = 1, k = 128;
  DType out = DType::kF32;
  bool quantise = false;
  int64_t x_pad = 0, w_pad = 0, out_pad = 0;  // elements between rows
  int scale_low = 110, scale_high = 125;
  double x_scale = 1.0;

  std::string str() const {
    std::ostringstream text;
    text << dtype_name(x) << " x " << dtype_name(w.dtype) << " [" << w.block_rows << ","
         << w.block_cols << "] m=" << m << " n=" << n << " k=" << k << " out=" << dtype_name(out)
         << (quantise ? " quantised" : "") << " pads " << x_pad << "," << w_pad << "," << out_pad
         << " scales " << scale_low << ".." << scale_high;
    return text.str();
  }
};

// Owns the memory of one problem. Everything outside the live columns holds NaN: a kernel that
// multiplies it, even by zero, is found.
class Data {
 public:
  Data(const Case& c, uint64_t seed) : case_(c), random_(seed) {
    fill_x();
    fill_w();
    out_.assign(static_cast<size_t>(c.m * (c.n + c.out_pad) * size_of(c.out) + kGuard), 0xa5);
  }

  LinearProblem problem() {
    const Case& c = case_;
    LinearProblem p;
    p.x = ConstTensor(x_.data(), c.x, {c.m, c.k});
    p.x.strides[0] = c.k + c.x_pad;
    p.w = weight_;
    p.out = Tensor(out_.data(), c.out, {c.m, c.n});
    p.out.strides[0] = c.n + c.out_pad;
    return p;
  }
  const std::vector<uint8_t>& out_bytes() const { return out_; }
  std::vector<uint8_t>& x_bytes() { return x_; }
  std::vector<uint8_t>& w_bytes() { return w_; }
  std::vector<uint8_t>& scales() { return scales_; }
  const Case& test_case() const { return case_; }

  double x_value(int64_t m, int64_t k) const {
    const int64_t i = m * (case_.k + case_.x_pad) + k;
    if (case_.x == DType::kF32) return reinterpret_cast<const float*>(x_.data())[i];
    return bf16_to_f32(reinterpret_cast<const uint16_t*>(x_.data())[i]);
  }
  double w_value(int64_t n, int64_t k) const {
    const int64_t i = n * weight_.row_stride + k;
    switch (case_.w.dtype) {
      case DType::kF8E4M3:
        return static_cast<double>(e4m3_to_f32(w_[i])) *
               e8m0_to_f32(
                   scales_[n / case_.w.block_rows * weight_.scale_stride + k / case_.w.block_cols]);
      case DType::kF4E2M1:
        return static_cast<double>(e2m1_to_f32(k % 2 == 0 ? w_[i / 2] & 15 : w_[i / 2] >> 4)) *
               e8m0_to_f32(scales_[n * weight_.scale_stride + k / 32]);
      case DType::kBf16:
        return bf16_to_f32(reinterpret_cast<const uint16_t*>(w_.data())[i]);
      default:
        return reinterpret_cast<const float*>(w_.data())[i];
    }
  }
  double out_value(int64_t m, int64_t n) const {
    const int64_t i = m * (case_.n + case_.out_pad) + n;
    if (case_.out == DType::kF32) return reinterpret_cast<const float*>(out_.data())[i];
    return bf16_to_f32(reinterpret_cast<const uint16_t*>(out_.data())[i]);
  }

 private:
  static constexpr size_t kGuard = 64;

  float normal() { return std::normal_distribution<float>()(random_); }

  void put(std::vector<uint8_t>& bytes, DType dtype, int64_t i, float value) {
    if (dtype == DType::kF32) {
      reinterpret_cast<float*>(bytes.data())[i] = value;
    } else {
      reinterpret_cast<uint16_t*>(bytes.data())[i] = f32_to_bf16(value);
    }
  }

  void fill_x() {
    const int64_t stride = case_.k + case_.x_pad;
    x_.assign(static_cast<size_t>(case_.m * stride * size_of(case_.x)), 0xff);
    for (int64_t m = 0; m < case_.m; ++m) {
      for (int64_t k = 0; k < case_.k; ++k)
        put(x_, case_.x, m * stride + k, normal() * static_cast<float>(case_.x_scale));
    }
  }

  void fill_w() {
    const Case& c = case_;
    weight_.dtype = c.w.dtype;
    weight_.rows = c.n;
    weight_.cols = c.k;
    weight_.row_stride = c.k + c.w_pad;
    const int64_t row_bytes = c.w.dtype == DType::kF4E2M1 ? weight_.row_stride / 2
                                                          : weight_.row_stride * size_of(c.w.dtype);
    // 0xff is NaN in every type but FP4, where padding cannot hurt by its value.
    w_.assign(static_cast<size_t>(c.n * row_bytes), 0xff);
    for (int64_t n = 0; n < c.n; ++n) {
      for (int64_t k = 0; k < c.k; ++k) {
        const int64_t i = n * weight_.row_stride + k;
        if (c.w.dtype == DType::kF8E4M3) {
          const auto code = static_cast<uint8_t>(random_());
          w_[i] = (code & 0x7f) == 0x7f ? code ^ 1 : code;
        } else if (c.w.dtype == DType::kF4E2M1) {
          if (k % 2 == 0) w_[i / 2] = static_cast<uint8_t>(random_());
        } else {
          put(w_, c.w.dtype, i, normal());
        }
      }
    }
    const bool fp4 = c.w.dtype == DType::kF4E2M1;
    if (!fp4 && c.w.dtype != DType::kF8E4M3) return;
    const int64_t scale_rows = fp4 ? c.n : ceil_div(c.n, c.w.block_rows);
    weight_.scale_stride = ceil_div(c.k, fp4 ? 32 : c.w.block_cols) + 3;
    weight_.block_rows = c.w.block_rows;
    weight_.block_cols = c.w.block_cols;
    scales_.resize(static_cast<size_t>(scale_rows * weight_.scale_stride));
    std::uniform_int_distribution<int> scale(c.scale_low, c.scale_high);
    for (uint8_t& byte : scales_) byte = static_cast<uint8_t>(scale(random_));
    weight_.data = w_.data();
    weight_.scale = scales_.data();
  }

  Case case_;
  std::mt19937_64 random_;
  std::vector<uint8_t> x_, w_, scales_, out_;
  Weight weight_;

 public:
  void bind() {
    weight_.data = w_.data();
    weight_.scale = scales_.empty() ? nullptr : scales_.data();
  }
};

// ---- running

Ops table(std::string_view candidate) {
  Ops ops;
  for (const Candidate& c : linear_candidates()) {
    if (c.name == candidate) c.install(ops);
  }
  return ops;
}

std::vector<std::string> usable_candidates() {
  std::vector<std::string> names;
  for (const Candidate& c : linear_candidates()) {
    if (c.why_not().empty()) names.emplace_back(c.name);
  }
  return names;
}

// Runs with exactly the scratch that linear_scratch_bytes promises to suffice.
void run(std::string_view candidate, std::span<const LinearProblem> problems, bool quantise,
         int threads) {
  const Ops ops = table(candidate);
  ThreadPool pool(threads);
  ScratchLimits limits;
  limits.num_threads = threads;
  for (const LinearProblem& p : problems) {
    limits.max_tokens = std::max(limits.max_tokens, p.x.shape[0]);
    limits.max_cols = std::max(limits.max_cols, p.w.cols);
    limits.max_rows = std::max(limits.max_rows, p.w.rows);
  }
  const int64_t bytes = linear_scratch_bytes(limits);
  std::vector<std::byte> memory(static_cast<size_t>(bytes) + 256);
  auto* aligned = memory.data() + (256 - reinterpret_cast<uintptr_t>(memory.data()) % 256) % 256;
  Arena arena(aligned, bytes);
  ops.linear({.problems = problems, .quantise_input = quantise},
             {.stream = {&pool}, .scratch = &arena, .ops = &ops});
  EXPECT_EQ(arena.used(), 0);
}

// Equal bits, but any NaN equals any other.
bool same_outputs(const Data& a, const Data& b, std::string& where) {
  if (a.out_bytes() == b.out_bytes()) return true;
  const Case& c = a.test_case();
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      const double x = a.out_value(m, n), y = b.out_value(m, n);
      if ((std::isnan(x) && std::isnan(y)) || (x == y && std::signbit(x) == std::signbit(y)))
        continue;
      where = concat("out[", m, "][", n, "]: ", x, " and ", y);
      return false;
    }
  }
  // All outputs agree: bytes between the rows must, too.
  std::vector<uint8_t> left = a.out_bytes(), right = b.out_bytes();
  const int64_t size = size_of(c.out);
  for (int64_t m = 0; m < c.m; ++m) {
    const int64_t row = m * (c.n + c.out_pad) * size;
    std::memset(left.data() + row, 0, static_cast<size_t>(c.n * size));
    std::memset(right.data() + row, 0, static_cast<size_t>(c.n * size));
  }
  where = "bytes outside of the output rows were written";
  return left == right;
}

// A copy of `data` with its own output.
Data run_copy(const Data& data, std::string_view candidate, int threads) {
  Data copy = data;
  copy.bind();
  const LinearProblem problem = copy.problem();
  run(candidate, {&problem, 1}, data.test_case().quantise, threads);
  return copy;
}

void expect_same_bits(const Data& data, std::initializer_list<int> thread_counts = {1, 2, 3}) {
  const Data expected = run_copy(data, "reference", 1);
  for (const std::string& name : usable_candidates()) {
    for (const int threads : thread_counts) {
      const Data actual = run_copy(data, name, threads);
      std::string where;
      EXPECT_TRUE(same_outputs(expected, actual, where))
          << name << ", " << threads << " threads, " << data.test_case().str() << ": " << where;
    }
  }
}

constexpr DType kFp8 = DType::kF8E4M3, kFp4 = DType::kF4E2M1, kBf16 = DType::kBf16,
                kF32 = DType::kF32;

// ---- the same bits from every candidate

TEST(Linear, EveryFormatAndRowCount) {
  uint64_t seed = 1;
  for (const DType x : {kBf16, kF32}) {
    for (const DType w : {kFp8, kFp4, kBf16, kF32}) {
      for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 17, 33}) {
        const Case c{.x = x,
                     .w = {w},
                     .m = m,
                     .n = m % 2 == 0 ? 37 : 64,
                     .k = m % 3 == 0 ? 1408 : 256,
                     .out = m % 2 == 0 ? kF32 : kBf16,
                     .quantise = x == kBf16 && m % 4 != 3};
        expect_same_bits(Data(c, seed++), {1, 2});
      }
    }
  }
}

TEST(Linear, EveryLengthOfColumnsAndRows) {
  uint64_t seed = 1000;
  for (const DType x : {kBf16, kF32}) {
    for (const DType w : {kFp8, kFp4, kBf16, kF32}) {
      for (const int64_t k : {2, 32, 64, 96, 128, 160, 1022, 1024, 1056, 1152, 2048, 2144}) {
        for (const int64_t m : {2, 6}) {
          const Case c{.x = x, .w = {w}, .m = m, .n = 1 + k % 7, .k = k, .quantise = x == kBf16};
          expect_same_bits(Data(c, seed++), {2});
        }
      }
    }
  }
  for (const int64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 63, 65, 129, 257}) {
    for (const int64_t m : {1, 6}) {
      for (const DType w : {kFp8, kFp4, kBf16})
        expect_same_bits(Data({.w = {w}, .m = m, .n = n, .k = 128}, seed++));
    }
  }
}

TEST(Linear, OddLengthsOfUnpackedWeights) {
  uint64_t seed = 2000;
  for (const DType w : {kFp8, kBf16, kF32}) {
    for (const int64_t k : {1, 3, 31, 127, 129, 1025}) {
      for (const int64_t m : {1, 6}) {
        expect_same_bits(Data({.w = {w}, .m = m, .n = 9, .k = k, .quantise = true}, seed++), {2});
        expect_same_bits(Data({.x = kF32, .w = {w}, .m = m, .n = 9, .k = k}, seed++), {2});
      }
    }
  }
}

TEST(Linear, StridesAndSlices) {
  uint64_t seed = 3000;
  for (const DType x : {kBf16, kF32}) {
    for (const DType w : {kFp8, kFp4, kBf16, kF32}) {
      for (const int64_t m : {1, 4, 10}) {
        const Case c{.x = x,
                     .w = {w},
                     .m = m,
                     .n = 20,
                     .k = 384,
                     .out = m == 4 ? kBf16 : kF32,
                     .x_pad = 5,
                     .w_pad = 128,
                     .out_pad = 3};
        expect_same_bits(Data(c, seed++), {2});
      }
    }
  }
}

// Row and column slices of a weight, as tensor parallelism takes them, give the slice's own result.
TEST(Linear, ColumnSlicesAddUp) {
  for (const DType w : {kFp8, kFp4, kBf16}) {
    Data data({.w = {w}, .m = 3, .n = 256, .k = 512}, 77);
    data.bind();
    const LinearProblem whole = data.problem();
    LinearProblem part = whole;
    part.w = whole.w.row_slice(128, 128).col_slice(256, 256);
    part.x.data = static_cast<const uint16_t*>(whole.x.data) + 256;
    part.x.shape[1] = 256;
    std::vector<float> out(3 * 128), expected(3 * 128);
    for (auto* memory : {&out, &expected}) {
      part.out = Tensor(memory->data(), kF32, {3, 128});
      run(memory == &out ? usable_candidates().front() : "reference", {&part, 1}, false, 2);
    }
    EXPECT_EQ(out, expected);
    for (int64_t m = 0; m < 3; ++m) {
      for (int64_t n = 0; n < 128; ++n) {
        double sum = 0, size = 0;
        for (int64_t k = 256; k < 512; ++k) {
          sum += data.x_value(m, k) * data.w_value(128 + n, k);
          size += std::fabs(data.x_value(m, k) * data.w_value(128 + n, k));
        }
        EXPECT_NEAR(out[m * 128 + n], sum, size * 256 * 0x1p-24);
      }
    }
  }
}

TEST(Linear, OtherScaleBlocks) {
  uint64_t seed = 4000;
  for (const auto& [rows, cols] : {std::pair{1, 128},
                                   {64, 128},
                                   {128, 256},
                                   {3, 1024},
                                   {128, 64},
                                   {16, 32},
                                   {1, 1},
                                   {7, 100},
                                   {128, 384}}) {
    for (const DType x : {kBf16, kF32}) {
      for (const int64_t m : {1, 5}) {
        const Case c{.x = x, .w = {kFp8, rows, cols}, .m = m, .n = 19, .k = 1300};
        expect_same_bits(Data(c, seed++), {2});
      }
    }
  }
}

// Several tiles of x, several panels, several threads.
TEST(Linear, ManyRows) {
  uint64_t seed = 5000;
  expect_same_bits(Data({.w = {kFp8}, .m = 300, .n = 70, .k = 256, .quantise = true}, seed++));
  expect_same_bits(Data({.w = {kFp4}, .m = 300, .n = 110, .k = 160}, seed++));
  expect_same_bits(Data({.w = {kBf16}, .m = 270, .n = 140, .k = 130, .out = kBf16}, seed++));
  expect_same_bits(Data({.x = kF32, .w = {kFp8}, .m = 300, .n = 70, .k = 136}, seed++));
}

// More rows than are prepared at once.
TEST(Linear, PanelsOfX) {
  expect_same_bits(Data({.w = {kFp8}, .m = 4099, .n = 5, .k = 128, .quantise = true}, 6000), {2});
  // Wide rows: panels of 256.
  expect_same_bits(Data({.w = {kFp8}, .m = 258, .n = 1, .k = 33000}, 6001), {2});
}

TEST(Linear, OneRowOfManyEqualsThatRowAlone) {
  for (const DType w : {kFp8, kFp4, kBf16}) {
    Data data({.w = {w}, .m = 70, .n = 33, .k = 1152, .quantise = true}, 91);
    const Data all = run_copy(data, usable_candidates().front(), 2);
    for (const int64_t m : {0, 1, 31, 69}) {
      Data one = data;
      one.bind();
      LinearProblem problem = one.problem();
      problem.x.data = static_cast<const uint16_t*>(problem.x.data) + m * problem.x.strides[0];
      problem.x.shape[0] = 1;
      std::vector<float> row(33);
      problem.out = Tensor(row.data(), kF32, {1, 33});
      run(usable_candidates().front(), {&problem, 1}, true, 1);
      for (int64_t n = 0; n < 33; ++n) EXPECT_EQ(row[n], all.out_value(m, n)) << m << ", " << n;
    }
  }
}

// ---- several problems in a call

TEST(Linear, ProblemsOfOneCallAreIndependent) {
  // Shared x (first three), own x, mixed formats; more problems than a pass holds.
  std::vector<Data> data;
  std::vector<LinearProblem> problems;
  for (int i = 0; i < 300; ++i) {
    const DType w = i % 5 == 4 ? kBf16 : i % 2 == 0 ? kFp8 : kFp4;
    data.emplace_back(Case{.w = {w}, .m = 1 + i % 9 / 8, .n = 3 + i % 4, .k = 256}, 7000 + i);
  }
  data.emplace_back(Case{.m = 0, .n = 4, .k = 128}, 1);
  for (Data& d : data) {
    d.bind();
    problems.push_back(d.problem());
  }
  problems[1].x = problems[2].x = problems[0].x;
  for (const std::string& name : usable_candidates()) {
    for (const int threads : {1, 3}) {
      run(name, problems, true, threads);
      for (size_t i = 0; i < problems.size(); i += 23) {
        std::vector<float> alone(static_cast<size_t>(problems[i].out.num_elements()));
        LinearProblem problem = problems[i];
        problem.out = Tensor(alone.data(), kF32, {problem.x.shape[0], problem.w.rows});
        run("reference", {&problem, 1}, true, 1);
        EXPECT_EQ(0, std::memcmp(alone.data(), problems[i].out.data, alone.size() * 4))
            << name << ", problem " << i;
      }
    }
  }
}

TEST(Linear, ScratchIsMeasuredWithoutTouchingData) {
  for (const std::string& name : usable_candidates()) {
    const Ops ops = table(name);
    Data data({.m = 40, .n = 50, .k = 700}, 3);
    LinearProblem problem = data.problem();
    problem.x.data = nullptr;
    problem.out.data = nullptr;
    problem.w.data = problem.w.scale = nullptr;
    Arena measure;
    ops.linear({.problems = {&problem, 1}}, {.stream = {}, .scratch = &measure, .ops = &ops});
    EXPECT_GT(measure.peak(), 0);
    EXPECT_LE(measure.peak(), linear_scratch_bytes({.max_tokens = 40, .max_cols = 700}));
  }
}

// ---- the definition itself

// |f32 sum - exact sum| <= gamma * sum |x w|: an output's terms pass at most K/16 fused steps, the
// tree (4) and the block sums; FP4 adds a fused step per 128 columns. f32 products are fused too.
TEST(Linear, CloseToDouble) {
  uint64_t seed = 8000;
  for (const DType x : {kBf16, kF32}) {
    for (const DType w : {kFp8, kFp4, kBf16, kF32}) {
      for (const int64_t k : {128, 1000, 4096}) {
        const Case c{.x = x, .w = {w}, .m = 3, .n = 17, .k = k};
        const Data data = run_copy(Data(c, seed++), "reference", 1);
        const double steps = std::ceil(static_cast<double>(k) / 16) + 8 + 4 +
                             std::ceil(static_cast<double>(k) / 1024) +
                             std::ceil(static_cast<double>(k) / 128);
        for (int64_t m = 0; m < c.m; ++m) {
          for (int64_t n = 0; n < c.n; ++n) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < k; ++i) {
              sum += data.x_value(m, i) * data.w_value(n, i);
              size += std::fabs(data.x_value(m, i) * data.w_value(n, i));
            }
            EXPECT_NEAR(data.out_value(m, n), sum, steps * 0x1p-24 * 1.01 * size) << c.str();
          }
        }
      }
    }
  }
}

// The quantised input: outputs of an identity weight are the dequantised values, one by one.
TEST(Linear, QuantisedInputFollowsTheScalarDefinition) {
  constexpr int64_t kCols = 300;  // a partial last group
  std::mt19937_64 random(5);
  for (const std::string& name : usable_candidates()) {
    for (int round = 0; round < 40; ++round) {
      std::vector<uint16_t> x(kCols), identity(kCols * kCols);
      const int spread = static_cast<int>(random() % 20);
      const int centre = static_cast<int>(random() % 60) - 30;
      for (auto& value : x) {
        const int exponent = 127 + centre - static_cast<int>(random() % (spread + 1));
        value = static_cast<uint16_t>((random() & 0x807f) | static_cast<uint64_t>(exponent) << 7);
      }
      if (round == 0) std::fill(x.begin(), x.end(), uint16_t{0});
      if (round == 1) std::fill(x.begin() + 128, x.end(), uint16_t{0x8000});
      if (round == 2) x[5] = f32_to_bf16(448.0f), x[140] = f32_to_bf16(450.0f);
      for (int64_t i = 0; i < kCols; ++i) identity[i * kCols + i] = f32_to_bf16(1.0f);
      std::vector<float> out(kCols);
      LinearProblem problem;
      problem.x = ConstTensor(x.data(), kBf16, {1, kCols});
      problem.w = {.dtype = kBf16,
                   .data = identity.data(),
                   .rows = kCols,
                   .cols = kCols,
                   .row_stride = kCols};
      problem.out = Tensor(out.data(), kF32, {1, kCols});
      run(name, {&problem, 1}, true, 1);
      for (int64_t i = 0; i < kCols; ++i) {
        float amax = 1e-4f;
        for (int64_t j = i / 128 * 128; j < std::min(kCols, i / 128 * 128 + 128); ++j)
          amax = std::max(amax, std::fabs(bf16_to_f32(x[j])));
        const int exponent = ceil_log2_ratio(amax, kE4m3Max);
        const float code = e4m3_to_f32(f32_to_e4m3(std::ldexp(bf16_to_f32(x[i]), -exponent)));
        EXPECT_EQ(out[i], std::ldexp(code, exponent)) << name << " round " << round << " at " << i;
      }
    }
  }
}

// ---- edges of the formats

TEST(Linear, ConversionTableIsExact) {
  const Fp8Tables& tables = fp8_tables();
  for (int scale = 0; scale < 256; ++scale) {
    for (int code = 0; code < 256; ++code) {
      const float actual =
          bf16_to_f32(tables.bf16(static_cast<uint8_t>(code), static_cast<uint8_t>(scale)));
      const double exact = static_cast<double>(e4m3_to_f32(static_cast<uint8_t>(code))) *
                           static_cast<double>(e8m0_to_f32(static_cast<uint8_t>(scale)));
      if (std::isnan(exact)) {
        EXPECT_TRUE(std::isnan(actual)) << code << " " << scale;
        continue;
      }
      double expected = exact;
      if (std::fabs(exact) < 0x1p-126) expected = 0;
      if (std::fabs(exact) >= 0x1p128) expected = std::numeric_limits<double>::infinity();
      EXPECT_EQ(std::fabs(actual), std::fabs(expected)) << code << " " << scale;
      EXPECT_EQ(std::signbit(actual), (code & 0x80) != 0) << code << " " << scale;
      // Within the range that checkpoints are checked for, nothing was flushed or overflowed.
      if (scale >= 10 && scale <= 246) {
        EXPECT_EQ(actual, exact) << code << " " << scale;
      }
    }
  }
}

TEST(Linear, EveryFp8CodeThroughTheKernels) {
  // Row n holds code n in column n % 128, zeros elsewhere; x is one.
  for (const std::string& name : usable_candidates()) {
    for (const DType x : {kBf16, kF32}) {
      for (const int64_t m : {1, 6}) {
        Data data({.x = x, .m = m, .n = 256, .k = 128}, 4);
        data.bind();
        std::fill(data.w_bytes().begin(), data.w_bytes().end(), uint8_t{0});
        for (int64_t n = 0; n < 256; ++n)
          data.w_bytes()[n * 128 + n % 128] = static_cast<uint8_t>(n);
        std::fill(data.scales().begin(), data.scales().end(), uint8_t{120});
        const LinearProblem problem = data.problem();
        for (int64_t i = 0; i < m * 128; ++i) {
          if (x == kF32) {
            reinterpret_cast<float*>(data.x_bytes().data())[i] = 1.0f;
          } else {
            reinterpret_cast<uint16_t*>(data.x_bytes().data())[i] = 0x3f80;
          }
        }
        run(name, {&problem, 1}, false, 1);
        for (int64_t n = 0; n < 256; ++n) {
          const double expected = std::ldexp(e4m3_to_f32(static_cast<uint8_t>(n)), 120 - 127);
          if (std::isnan(expected)) {
            EXPECT_TRUE(std::isnan(data.out_value(m - 1, n))) << name << " code " << n;
          } else {
            EXPECT_EQ(data.out_value(m - 1, n), expected) << name << " code " << n;
          }
        }
      }
    }
  }
}

// A NaN weight or input reaches exactly the outputs that depend on it.
TEST(Linear, NanPropagates) {
  for (const DType w : {kFp8, kFp4, kBf16, kF32}) {
    for (const DType x : {kBf16, kF32}) {
      for (const bool quantise : {false, true}) {
        if (quantise && x == kF32) continue;
        for (const int64_t m : {2, 12}) {
          Data data({.x = x, .w = {w}, .m = m, .n = 40, .k = 256, .quantise = quantise}, 11);
          const bool nan_weight = w != kFp4;
          if (w == kFp8) data.w_bytes()[7 * 256 + 200] = 0xff;
          if (w == kBf16)
            reinterpret_cast<uint16_t*>(data.w_bytes().data())[7 * 256 + 200] = 0x7fc0;
          if (w == kF32)
            reinterpret_cast<float*>(data.w_bytes().data())[7 * 256 + 200] = std::nanf("");
          if (x == kF32) {
            reinterpret_cast<float*>(data.x_bytes().data())[256 + 3] = std::nanf("");
          } else {
            reinterpret_cast<uint16_t*>(data.x_bytes().data())[256 + 3] = 0x7fc0;
          }
          for (const std::string& name : usable_candidates()) {
            const Data out = run_copy(data, name, 2);
            for (int64_t row = 0; row < m; ++row) {
              for (int64_t n = 0; n < 40; ++n) {
                EXPECT_EQ(std::isnan(out.out_value(row, n)), row == 1 || (nan_weight && n == 7))
                    << name << " " << dtype_name(w) << " " << row << " " << n;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Linear, ScalesOutsideTheNormalRange) {
  uint64_t seed = 9000;
  for (const DType w : {kFp8, kFp4}) {
    for (const DType x : {kBf16, kF32}) {
      for (const auto& [low, high] :
           {std::pair{0, 12}, {0, 0}, {1, 3}, {240, 254}, {250, 255}, {0, 255}}) {
        for (const int64_t m : {1, 3, 6, 20}) {
          const Case c{.x = x,
                       .w = {w},
                       .m = m,
                       .n = 30,
                       .k = 1152,
                       .scale_low = low,
                       .scale_high = high,
                       .x_scale = low == 0 ? 0x1p20 : 1.0};
          expect_same_bits(Data(c, seed++), {2});
        }
      }
    }
  }
}

// Sums near 2^-126: every candidate flushes the same steps, and FP4 scales are folded only where
// that is exact.
TEST(Linear, TinyAndHugeInputs) {
  uint64_t seed = 10000;
  for (const DType w : {kFp8, kFp4, kBf16, kF32}) {
    for (const DType x : {kBf16, kF32}) {
      for (const double scale : {0x1p-126, 0x1p-120, 0x1p-112, 0x1p-60, 0x1p100, 0x1p124}) {
        for (const int64_t m : {2, 9}) {
          const Case c{.x = x, .w = {w}, .m = m, .n = 23, .k = 640, .x_scale = scale};
          expect_same_bits(Data(c, seed++), {1});
        }
      }
    }
  }
}

TEST(Linear, EmptyCalls) {
  for (const std::string& name : usable_candidates()) {
    run(name, {}, false, 1);
    Data data({.m = 0, .n = 4, .k = 128}, 1);
    const LinearProblem problem = data.problem();
    run(name, {&problem, 1}, true, 2);
  }
}

TEST(Linear, CandidatesEndWithTheReference) {
  ASSERT_FALSE(linear_candidates().empty());
  EXPECT_EQ(linear_candidates().back().name, "reference");
  EXPECT_EQ(linear_candidates().back().why_not(), "");
  for (const Candidate& c : linear_candidates()) EXPECT_EQ(c.family, "linear");
}

}  // namespace
}  // namespace dsv4::cpu
