// Memory with guard bytes on both sides, so that a test notices writes outside an output.
#pragma once
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace dsv4::testing {

/// `bytes` of memory aligned to 256, filled with 0xff (NaN in every float format here), between two
/// guards of 4 KiB.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t bytes)
      : bytes_(bytes), storage_(static_cast<size_t>(bytes + 2 * kGuardBytes + kAlignment)) {
    std::memset(storage_.data(), kGuard, storage_.size());
    const auto address = reinterpret_cast<uintptr_t>(storage_.data()) + kGuardBytes;
    begin_ = (address + kAlignment - 1) / kAlignment * kAlignment -
             reinterpret_cast<uintptr_t>(storage_.data());
    std::memset(data(), 0xff, static_cast<size_t>(bytes));
  }
  std::byte* data() { return reinterpret_cast<std::byte*>(storage_.data() + begin_); }
  const std::byte* data() const {
    return reinterpret_cast<const std::byte*>(storage_.data() + begin_);
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  int64_t bytes() const { return bytes_; }
  /// Fails when a byte outside [data, data + bytes) changed; the message says which one.
  ::testing::AssertionResult intact() const {
    for (size_t i = 0; i < storage_.size(); ++i) {
      const bool outside = i < begin_ || i >= begin_ + static_cast<size_t>(bytes_);
      if (outside && storage_[i] != kGuard) {
        return ::testing::AssertionFailure()
               << "byte " << static_cast<int64_t>(i) - static_cast<int64_t>(begin_)
               << " of a buffer of " << bytes_ << " bytes was overwritten";
      }
    }
    return ::testing::AssertionSuccess();
  }

 private:
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kAlignment = 256;
  static constexpr uint8_t kGuard = 0xa5;
  int64_t bytes_;
  size_t begin_ = 0;
  std::vector<uint8_t> storage_;
};

}  // namespace dsv4::testing
