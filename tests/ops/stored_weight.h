// Random matrices in the storage of a checkpoint, for tests of dense products.
#pragma once
#include <cstdint>
#include <vector>

#include "tests/ops/oracle_testing.h"

namespace dsv4::testing {

/// A random matrix as a checkpoint stores it, and the numbers that it stands for.
struct StoredWeight {
  Weight weight;
  oracle::Weight numbers;
};

inline StoredWeight make_weight(DeviceMemory& memory, DType dtype, int64_t rows, int64_t cols,
                                uint64_t seed) {
  Random random(seed);
  StoredWeight out;
  out.weight = {.dtype = dtype, .rows = rows, .cols = cols, .row_stride = cols};
  out.numbers.rows = rows;
  out.numbers.cols = cols;
  const auto scale_byte = [&] { return static_cast<uint8_t>(117 + random.below(8)); };
  std::vector<float>& numbers = out.numbers.values;
  if (dtype == DType::kF8E4M3) {
    const int64_t block_cols = (cols + 127) / 128, block_rows = (rows + 127) / 128;
    std::vector<uint8_t> codes, scales;
    for (int64_t i = 0; i < block_rows * block_cols; ++i) scales.push_back(scale_byte());
    for (int64_t i = 0; i < rows * cols; ++i) {
      uint8_t code;
      do {
        code = static_cast<uint8_t>(random.below(256));
      } while ((code & 0x7f) == 0x7f);  // NaN
      codes.push_back(code);
      const uint8_t scale = scales[i / cols / 128 * block_cols + i % cols / 128];
      numbers.push_back(static_cast<float>(oracle::e4m3_decode(code) * oracle::e8m0_decode(scale)));
    }
    out.weight.data = memory.put(codes);
    out.weight.scale = memory.put(scales);
    out.weight.scale_stride = block_cols;
  } else if (dtype == DType::kF4E2M1) {
    std::vector<uint8_t> pairs, scales;
    for (int64_t i = 0; i < rows * cols / 32; ++i) scales.push_back(scale_byte());
    for (int64_t i = 0; i < rows * cols; ++i) {
      const auto code = static_cast<uint8_t>(random.below(16));
      if (i % 2 == 0) {
        pairs.push_back(code);
      } else {
        pairs.back() = static_cast<uint8_t>(pairs.back() | code << 4);
      }
      numbers.push_back(
          static_cast<float>(oracle::e2m1_decode(code) * oracle::e8m0_decode(scales[i / 32])));
    }
    out.weight.data = memory.put(pairs);
    out.weight.scale = memory.put(scales);
    out.weight.scale_stride = cols / 32;
  } else {
    const Vector values = rounded(dtype, normal_values(random, rows * cols, 0.05));
    numbers.assign(values.begin(), values.end());
    out.weight.data = memory.tensor(dtype, {rows, cols}, values).data;
  }
  return out;
}

}  // namespace dsv4::testing
