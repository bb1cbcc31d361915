// The two containers of the oracle. The oracle is a float64 program written from the
// specification alone: loops, no code shared with the library, no speed. Everything else is
// measured against it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace oracle {

using Vector = std::vector<double>;

/// Row-major [rows, cols] of activations.
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  Vector values;

  Matrix() = default;
  Matrix(int64_t rows_, int64_t cols_)
      : rows(rows_), cols(cols_), values(static_cast<size_t>(rows_ * cols_), 0.0) {}
  std::span<double> row(int64_t i) { return {values.data() + i * cols, static_cast<size_t>(cols)}; }
  std::span<const double> row(int64_t i) const {
    return {values.data() + i * cols, static_cast<size_t>(cols)};
  }
};

/// Row-major [rows, cols] of the numbers that a checkpoint's bytes stand for: exact in float for
/// every storage dtype, which halves the memory of real-geometry layers. A vector has rows = 1.
struct Weight {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values;
  bool quantised = false;  ///< stored as FP8 or FP4: linears then quantise their input, if asked

  std::span<const float> row(int64_t i) const {
    return {values.data() + i * cols, static_cast<size_t>(cols)};
  }
};

}  // namespace oracle
