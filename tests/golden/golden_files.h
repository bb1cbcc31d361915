// Reading golden data and comparing with it. What each tensor means:
// tests/golden/data/manifest.json and README.md.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "dsv4/attention.h"

namespace dsv4::golden {

inline std::string data_path(const std::string& name) {
  return std::string(DSV4_SOURCE_DIR) + "/tests/golden/data/" + name;
}
inline std::string model_path() {
  return std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare";
}

inline std::vector<int32_t> ints(const SafetensorsFile& file, const std::string& name) {
  const ConstTensor tensor = file.get(name);
  return {tensor.as<int32_t>(), tensor.as<int32_t>() + tensor.num_elements()};
}

inline bool has(const SafetensorsFile& file, const std::string& name) {
  for (const std::string& known : file.names()) {
    if (known == name) return true;
  }
  return false;
}

/// Keeps every tap as rows of f32 or i32; steps are appended, rows may have different widths.
class KeptTaps final : public TapSink {
 public:
  struct Rows {
    std::vector<std::vector<float>> f32;
    std::vector<std::vector<int32_t>> i32;
  };
  void tap(std::string_view name, const ConstTensor& value) override {
    Rows& rows = rows_[std::string(name)];
    const int64_t count = value.shape[0];
    const int64_t width = count == 0 ? 0 : value.num_elements() / count;
    for (int64_t r = 0; r < count; ++r) {
      if (value.dtype == DType::kI32) {
        rows.i32.emplace_back(value.as<int32_t>() + r * width,
                              value.as<int32_t>() + (r + 1) * width);
        continue;
      }
      std::vector<float>& row = rows.f32.emplace_back(static_cast<size_t>(width));
      for (int64_t i = 0; i < width; ++i) {
        row[static_cast<size_t>(i)] = value.dtype == DType::kBf16
                                          ? static_cast<float>(value.as<Bf16>()[r * width + i])
                                          : value.as<float>()[r * width + i];
      }
    }
  }
  const Rows& at(const std::string& name) const {
    const auto found = rows_.find(name);
    if (found == rows_.end()) fail(ErrorCode::kNotFound, "no tap named ", name);
    return found->second;
  }

 private:
  std::map<std::string, Rows> rows_;
};

/// The largest |value| of a tensor: golden tolerances are relative to it.
inline double largest(const ConstTensor& tensor) {
  double out = 0;
  for (int64_t i = 0; i < tensor.num_elements(); ++i) {
    const double value = std::fabs(tensor.as<float>()[i]);
    if (std::isfinite(value)) out = std::max(out, value);
  }
  return out;
}

/// given[row] against row `golden_row` of `golden`, within `bound`; reports the worst element.
inline void expect_row_near(const ConstTensor& golden, int64_t golden_row,
                            const std::vector<float>& given, double bound,
                            const std::string& what) {
  const int64_t width = golden.num_elements() / golden.shape[0];
  ASSERT_EQ(static_cast<int64_t>(given.size()), width) << what;
  double worst = -1;
  int64_t at = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double difference = std::fabs(static_cast<double>(given[static_cast<size_t>(i)]) -
                                        golden.as<float>()[golden_row * width + i]);
    if (!(difference <= worst)) {  // also when it is NaN
      worst = difference;
      at = i;
    }
  }
  EXPECT_LE(worst, bound) << what << ": row " << golden_row << " column " << at << ": "
                          << given[static_cast<size_t>(at)] << ", golden "
                          << golden.as<float>()[golden_row * width + at];
}

}  // namespace dsv4::golden
