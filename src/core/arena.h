// Bump allocation over borrowed memory: workspace is sized once, before the first step, and never
// grows after.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/checked_math.h"
#include "core/fail.h"
#include "dsv4/tensor.h"

namespace dsv4 {

/// Hands out aligned pieces of one region. A default-constructed arena only measures: `take`
/// returns null and `peak` grows, so that the code that allocates also answers how much it needs.
class Arena {
 public:
  static constexpr int64_t kAlignment = 256;

  Arena() = default;
  Arena(std::byte* base, int64_t bytes) : base_(base), bytes_(bytes) {}

  bool measuring() const { return base_ == nullptr; }
  int64_t used() const { return used_; }
  int64_t peak() const { return peak_; }

  /// @throws Error kInternal naming needed and available bytes when the region is too small: a
  /// sizing fault of ours.
  std::byte* take(int64_t bytes) {
    const int64_t begin = used_;
    used_ = begin + round_up(bytes, kAlignment);
    if (used_ > peak_) peak_ = used_;
    if (measuring()) return nullptr;
    if (used_ > bytes_) {
      fail(ErrorCode::kInternal, "workspace too small: ", used_, " bytes needed, ", bytes_,
           " were reserved at load");
    }
    return base_ + begin;
  }
  template <typename T>
  T* take_array(int64_t count) {
    return reinterpret_cast<T*>(take(count * static_cast<int64_t>(sizeof(T))));
  }
  Tensor take_tensor(DType dtype, std::initializer_list<int64_t> shape) {
    Tensor tensor(nullptr, dtype, shape);
    tensor.data = take(tensor.num_bytes());
    return tensor;
  }

  /// Everything taken while a Scope lives is given back at its end.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), used_(arena.used_) {}
    ~Scope() { arena_.used_ = used_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    int64_t used_;
  };

 private:
  std::byte* base_ = nullptr;
  int64_t bytes_ = 0;
  int64_t used_ = 0;
  int64_t peak_ = 0;
};

}  // namespace dsv4
