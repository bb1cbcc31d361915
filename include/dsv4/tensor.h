// Views of memory: pointer, element type, shape, strides. A view never owns; whoever stores one
// documents what must outlive it. `ConstTensor` is for inputs, `Tensor` for outputs.
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "dsv4/dtype.h"

namespace dsv4 {

constexpr int kMaxRank = 4;

/// Element strides, shape and type of a region of memory. Row-major unless strides say otherwise.
template <bool kConst>
struct BasicTensor {
  using Pointer = std::conditional_t<kConst, const void*, void*>;

  Pointer data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};  ///< in elements

  BasicTensor() = default;
  /// Contiguous row-major view of `shape`.
  BasicTensor(Pointer data_, DType dtype_, std::initializer_list<int64_t> shape_)
      : data(data_), dtype(dtype_), rank(static_cast<int>(shape_.size())) {
    int i = 0;
    for (int64_t extent : shape_) shape[i++] = extent;
    int64_t stride = 1;
    for (i = rank - 1; i >= 0; --i) {
      strides[i] = stride;
      stride *= shape[i];
    }
  }
  /// A mutable view is usable wherever a constant one is asked for.
  template <bool kOther, typename = std::enable_if_t<kConst && !kOther>>
  BasicTensor(const BasicTensor<kOther>& other)  // NOLINT: implicit on purpose
      : data(other.data),
        dtype(other.dtype),
        rank(other.rank),
        shape(other.shape),
        strides(other.strides) {}

  explicit operator bool() const { return data != nullptr; }
  int64_t num_elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  int64_t num_bytes() const { return num_elements() * size_of(dtype); }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != stride) return false;
      stride *= shape[i];
    }
    return true;
  }
  template <typename T>
  auto as() const {
    using Element = std::conditional_t<kConst, const T, T>;
    return static_cast<Element*>(data);
  }
  /// Rows [begin, begin + count) of the first dimension.
  BasicTensor rows(int64_t begin, int64_t count) const {
    BasicTensor out = *this;
    using Byte = std::conditional_t<kConst, const char, char>;
    out.data = static_cast<Byte*>(data) + begin * strides[0] * size_of(dtype);
    out.shape[0] = count;
    return out;
  }
};

using Tensor = BasicTensor<false>;
using ConstTensor = BasicTensor<true>;

/// "[4096, 512] bf16", for messages.
std::string describe(const ConstTensor& tensor);

}  // namespace dsv4
