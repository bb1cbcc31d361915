// The formula against the golden manifest, and the two storages against each other.
#include "checkpoint/formula.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <set>
#include <thread>

#include "core/checked_math.h"
#include "core/numbers.h"
#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

using nlohmann::json;

const json& manifest() {
  static const json document = json::parse(read_file(
      std::string(DSV4_SOURCE_DIR) + "/tests/golden/data/manifest.json"))["flash_attention"];
  return document;
}

ExpectedTensor tensor_of(const std::string& name, std::vector<int64_t> shape, DType dtype,
                         int block_rows = 0, int block_cols = 0) {
  return {name, std::move(shape), dtype, "a test", block_rows, block_cols};
}

TEST(Formula, TestsOfTheManifest) {
  const json& tests = manifest()["formula"]["tests"];
  char key[32];
  std::snprintf(key, sizeof(key), "0x%llx",
                static_cast<unsigned long long>(formula_key("x.200", 0)));
  EXPECT_EQ(key, tests["fnv1a64('x.200')"].get<std::string>());
  const json& values = tests["u for name 'x.200', seed 1, i = 0..3"];
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(formula_uniform(formula_key("x.200", 1), i), values[i].get<double>());
  }
}

TEST(Formula, UniformIsOddMultiplesOfItsStep) {
  const uint64_t key = formula_key("anything", 3);
  for (uint64_t i = 0; i < 1000; ++i) {
    const double steps = formula_uniform(key, i) * 0x1p24;
    EXPECT_EQ(steps, std::floor(steps));
    EXPECT_EQ(std::fmod(std::abs(steps), 2.0), 1.0);
    EXPECT_LT(std::abs(steps), 0x1p24);
  }
}

int64_t count_of(const json& shape) {
  int64_t out = 1;
  for (const json& extent : shape) out *= extent.get<int64_t>();
  return out;
}

TEST(Formula, WeightsOfTheManifest) {
  // Sums over all elements are compared for tensors up to this size, and for one of 33 million.
  constexpr int64_t kMaxSummed = int64_t{1} << 21;
  std::vector<ExpectedTensor> tensors;
  for (const auto& item : manifest()["weights"].items()) {
    const bool f32 = item.key().ends_with("ape") || item.key().ends_with("attn_sink");
    tensors.push_back(tensor_of(item.key(), item.value()["shape"].get<std::vector<int64_t>>(),
                                f32 ? DType::kF32 : DType::kBf16));
  }
  const uint64_t seed = manifest()["seed"].get<uint64_t>();
  const auto source = formula_source(tensors, seed, FormulaStorage::kBf16Values);
  int summed = 0;
  for (const ExpectedTensor& expected : tensors) {
    const json& golden = manifest()["weights"][expected.name];
    const FormulaRule rule = formula_rule(expected.name, expected.shape.back());
    EXPECT_EQ(rule.scale, golden["scale"].get<double>()) << expected.name;
    EXPECT_EQ(rule.offset, golden["offset"].get<double>()) << expected.name;
    const std::vector<float> first = formula_values(expected.name, seed, 4, rule);
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(first[i], golden["first"][i].get<float>()) << expected.name << " " << i;
    }
    const bool large = expected.name == "csa.wq_b.weight";
    if (count_of(golden["shape"]) > kMaxSummed && !large) continue;
    const ConstTensor tensor = source->get(expected.name);
    EXPECT_EQ(tensor.dtype, expected.dtype);
    uint64_t sum = 0;
    for (int64_t i = 0; i < tensor.num_elements(); ++i) {
      sum += tensor.dtype == DType::kF32 ? std::bit_cast<uint32_t>(tensor.as<float>()[i]) >> 16
                                         : tensor.as<uint16_t>()[i];
    }
    EXPECT_EQ(sum, golden["sum_of_bf16_bits"].get<uint64_t>()) << expected.name;
    ++summed;
  }
  EXPECT_GE(summed, 15);
}

TEST(Formula, InputsOfTheManifest) {
  for (const auto& item : manifest()["inputs"].items()) {
    const json& golden = item.value();
    EXPECT_EQ(golden["scale"].get<double>(), kFormulaInput.scale);
    const std::vector<float> values =
        formula_values(item.key(), 1, count_of(golden["shape"]), kFormulaInput);
    uint64_t sum = 0;
    for (float value : values) {
      EXPECT_EQ(std::bit_cast<uint32_t>(value) & 0xffff, 0u);
      sum += std::bit_cast<uint32_t>(value) >> 16;
    }
    EXPECT_EQ(sum, golden["sum_of_bf16_bits"].get<uint64_t>()) << item.key();
    for (size_t i = 0; i < 4; ++i) EXPECT_EQ(values[i], golden["first"][i].get<float>());
  }
}

TEST(Formula, ScaleFollowsFanIn) {
  // 2^ceil(log2(2 / sqrt(fan_in)))
  EXPECT_EQ(formula_rule("layers.0.attn.wq_a.weight", 4096).scale, 0.03125);
  EXPECT_EQ(formula_rule("layers.0.attn.wq_a.weight", 7168).scale, 0.03125);
  EXPECT_EQ(formula_rule("layers.0.attn.wq_b.weight", 1536).scale, 0.0625);
  EXPECT_EQ(formula_rule("layers.0.ffn.gate.weight", 256).scale, 0.125);
  EXPECT_EQ(formula_rule("layers.0.hc_attn_fn", 16384).scale, 0.015625);
  EXPECT_EQ(formula_rule("mtp.0.enorm.weight", 64).offset, 1.0);
  EXPECT_EQ(formula_rule("norm.weight", 64).offset, 1.0);
}

// ---- released storage ----

/// Compares a quantised tensor with its bf16 values, element by element, by the scalar encoders.
void check_quantised(DType dtype, int64_t rows, int64_t cols, int block_rows, int block_cols) {
  const bool fp4 = dtype == DType::kF4E2M1;
  const float qmax = fp4 ? kE2m1Max : kE4m3Max;
  const int64_t scale_rows = ceil_div(rows, block_rows), scale_cols = ceil_div(cols, block_cols);
  const std::vector<ExpectedTensor> tensors = {
      tensor_of("w.weight", {rows, fp4 ? cols / 2 : cols}, dtype),
      tensor_of("w.scale", {scale_rows, scale_cols}, DType::kF8E8M0, block_rows, block_cols)};
  const auto plain = formula_source(tensors, 5, FormulaStorage::kBf16Values);
  const auto released = formula_source(tensors, 5, FormulaStorage::kReleased);
  EXPECT_FALSE(plain->contains("w.scale"));
  const ConstTensor values = plain->get("w.weight");
  ASSERT_EQ(values.shape[1], cols);
  const ConstTensor scale = released->get("w.scale");  // asked for before its weight
  const ConstTensor codes = released->get("w.weight");
  ASSERT_EQ(codes.dtype, dtype);
  ASSERT_EQ(scale.dtype, DType::kF8E8M0);
  std::vector<float> amax(static_cast<size_t>(scale_rows * scale_cols), 0.0f);
  const auto block_of = [&](int64_t r, int64_t c) {
    return static_cast<size_t>(r / block_rows * scale_cols + c / block_cols);
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      float& largest = amax[block_of(r, c)];
      largest = std::max(largest, std::abs(bf16_to_f32(values.as<uint16_t>()[r * cols + c])));
    }
  }
  for (size_t i = 0; i < amax.size(); ++i) {
    const float factor = e8m0_to_f32(scale.as<uint8_t>()[i]);
    EXPECT_LE(amax[i], qmax * factor) << "block " << i << " clips";
    EXPECT_GT(amax[i], qmax * factor / 2) << "block " << i << " could have a smaller scale";
  }
  int64_t wrong = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const float value = bf16_to_f32(values.as<uint16_t>()[r * cols + c]) /
                          e8m0_to_f32(scale.as<uint8_t>()[block_of(r, c)]);
      const int64_t i = r * cols + c;
      if (fp4) {
        const uint8_t byte = codes.as<uint8_t>()[i / 2];
        wrong += f32_to_e2m1(value) != (i % 2 == 0 ? byte & 15 : byte >> 4);
      } else {
        wrong += f32_to_e4m3(value) != codes.as<uint8_t>()[i];
      }
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST(Formula, ReleasedStorageFp8) {
  check_quantised(DType::kF8E4M3, 128, 256, 128, 128);
  check_quantised(DType::kF8E4M3, 257, 200, 128, 128);  // blocks cut off at both edges
  check_quantised(DType::kF8E4M3, 257, 320, 96, 160);
  check_quantised(DType::kF8E4M3, 5, 7, 128, 128);
  check_quantised(DType::kF8E4M3, 640, 1024, 128, 128);  // several pieces
}

TEST(Formula, ReleasedStorageFp4) {
  check_quantised(DType::kF4E2M1, 3, 32, 1, 32);
  check_quantised(DType::kF4E2M1, 700, 512, 1, 32);
}

TEST(Formula, ExpertTablesListDifferentExperts) {
  for (int64_t experts : {3, 16, 256}) {
    const int64_t per_row = std::min<int64_t>(experts, 6), rows = 3000;
    const std::vector<ExpectedTensor> tensors = {
        tensor_of("layers.0.ffn.gate.weight", {experts, 8}, DType::kBf16),
        tensor_of("layers.0.ffn.gate.tid2eid", {rows, per_row}, DType::kI64)};
    const auto source = formula_source(tensors, 1, FormulaStorage::kReleased);
    const ConstTensor table = source->get("layers.0.ffn.gate.tid2eid");
    ASSERT_EQ(table.dtype, DType::kI64);
    std::vector<int> uses(static_cast<size_t>(experts), 0);
    for (int64_t row = 0; row < rows; ++row) {
      std::set<int64_t> ids;
      for (int64_t j = 0; j < per_row; ++j) {
        const int64_t id = table.as<int64_t>()[row * per_row + j];
        ASSERT_GE(id, 0);
        ASSERT_LT(id, experts);
        ++uses[static_cast<size_t>(id)];
        ids.insert(id);
      }
      ASSERT_EQ(ids.size(), static_cast<size_t>(per_row)) << "row " << row;
    }
    // Uniform: the mean is rows * per_row / experts >= 70, its deviation below its square root.
    const double mean = static_cast<double>(rows * per_row) / static_cast<double>(experts);
    for (int count : uses) EXPECT_NEAR(count, mean, 6 * std::sqrt(mean));
  }
}

TEST(Formula, SameViewsForAllThreads) {
  const ModelConfig config = small_config();
  const std::vector<ExpectedTensor> tensors = expected_tensors(config);
  const auto source = formula_source(tensors, 1, FormulaStorage::kReleased);
  std::vector<std::vector<const void*>> seen(4);
  std::vector<std::thread> threads;
  for (auto& mine : seen) {
    threads.emplace_back([&] {
      for (const ExpectedTensor& tensor : tensors) mine.push_back(source->get(tensor.name).data);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& mine : seen) EXPECT_EQ(mine, seen[0]);
}

TEST(Formula, HasWhatItWasAskedFor) {
  const ModelConfig config = small_config();
  const std::vector<ExpectedTensor> tensors = expected_tensors(config);
  const auto source = formula_source(tensors, 1, FormulaStorage::kReleased);
  for (const ExpectedTensor& tensor : tensors) {
    const ConstTensor view = source->get(tensor.name);
    EXPECT_EQ(view.dtype, tensor.dtype) << tensor.name;
    EXPECT_EQ(view.num_bytes(), tensor.num_bytes()) << tensor.name;
  }
  EXPECT_NE(source->origin("embed.weight").find("seed 1"), std::string::npos);
  expect_error(ErrorCode::kNotFound, {"'layers.9.attn_norm.weight'", "seed 1"},
               [&] { source->get("layers.9.attn_norm.weight"); });
  expect_error(ErrorCode::kInvalidArgument, {"'a.weight'", "twice"}, [] {
    const ExpectedTensor tensor = tensor_of("a.weight", {1}, DType::kBf16);
    formula_source({tensor, tensor}, 1, FormulaStorage::kReleased);
  });
  expect_error(ErrorCode::kNotFound, {"'a.scale'"}, [] {
    formula_source({tensor_of("a.weight", {32, 32}, DType::kF8E4M3)}, 1, FormulaStorage::kReleased)
        ->get("a.weight");
  });
}

}  // namespace
}  // namespace dsv4::testing
