#include "tap_collector.h"

#include <limits>

#include "core/fail.h"
#include "core/numbers.h"

namespace dsv4::cli {

void TapCollector::tap(std::string_view name, const ConstTensor& value) {
  Collected& into = collected_[std::string(name)];
  std::vector<int64_t> shape(value.shape.begin() + 1, value.shape.begin() + value.rank);
  if (into.rows == 0) {
    into.dtype = value.dtype == DType::kI32 ? DType::kI32 : DType::kF32;
    into.shape = shape;
  } else if (shape != into.shape) {
    // Only a single dimension may differ: the number of compressed entries known so far.
    DSV4_CHECK(shape.size() == 1 && into.shape.size() == 1 && into.dtype == DType::kF32);
    const int64_t old_cols = into.shape[0], cols = std::max(old_cols, shape[0]);
    if (cols > old_cols) {
      std::vector<float> wider(static_cast<size_t>(into.rows * cols),
                               -std::numeric_limits<float>::infinity());
      for (int64_t row = 0; row < into.rows; ++row) {
        std::copy_n(into.f32.begin() + row * old_cols, old_cols, wider.begin() + row * cols);
      }
      into.f32 = std::move(wider);
      into.shape[0] = cols;
    }
  }
  const int64_t rows = value.shape[0];
  const int64_t elems = value.num_elements();
  const int64_t row_elems = rows == 0 ? 0 : elems / rows;
  into.rows += rows;
  if (into.dtype == DType::kI32) {
    into.i32.insert(into.i32.end(), value.as<int32_t>(), value.as<int32_t>() + elems);
    return;
  }
  int64_t into_elems = 1;
  for (int64_t extent : into.shape) into_elems *= extent;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < row_elems; ++i) {
      const int64_t at = row * row_elems + i;
      into.f32.push_back(value.dtype == DType::kBf16 ? static_cast<float>(value.as<Bf16>()[at])
                                                     : value.as<float>()[at]);
    }
    into.f32.resize(into.f32.size() + static_cast<size_t>(into_elems - row_elems),
                    -std::numeric_limits<float>::infinity());
  }
}

std::vector<std::pair<std::string, ConstTensor>> TapCollector::tensors() {
  std::vector<std::pair<std::string, ConstTensor>> out;
  for (auto& [name, collected] : collected_) {
    ConstTensor tensor;
    tensor.dtype = collected.dtype;
    tensor.data = collected.dtype == DType::kI32 ? static_cast<const void*>(collected.i32.data())
                                                 : static_cast<const void*>(collected.f32.data());
    tensor.rank = static_cast<int>(collected.shape.size()) + 1;
    tensor.shape[0] = collected.rows;
    std::copy(collected.shape.begin(), collected.shape.end(), tensor.shape.begin() + 1);
    int64_t stride = 1;
    for (int i = tensor.rank - 1; i >= 0; --i) {
      tensor.strides[static_cast<size_t>(i)] = stride;
      stride *= tensor.shape[static_cast<size_t>(i)];
    }
    out.emplace_back(name, tensor);
  }
  return out;
}

}  // namespace dsv4::cli
