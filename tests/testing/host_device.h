// A device for tests of code that only allocates and copies: host memory, no operations.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/checked_math.h"
#include "core/fail.h"
#include "dsv4/device.h"

namespace dsv4::testing {

/// Memory from aligned_alloc, copies by memcpy, at once. `allocated_bytes` counts what is alive, so
/// that a test can see that everything was given back. ops() throws.
class HostDevice final : public Device {
 public:
  explicit HostDevice(int64_t capacity_bytes = int64_t{1} << 40) : capacity_(capacity_bytes) {}

  DeviceId id() const override { return {Platform::kCpu, 0}; }
  std::string description() const override { return "host memory of a test"; }
  Buffer allocate(int64_t bytes) override {
    constexpr int64_t kAlignment = 256;
    if (bytes > capacity_ - allocated_) {
      fail(ErrorCode::kOutOfMemory, "test device: ", bytes, " bytes wanted, ",
           capacity_ - allocated_, " free");
    }
    void* data = std::aligned_alloc(kAlignment, static_cast<size_t>(round_up(bytes, kAlignment)));
    if (data == nullptr) fail(ErrorCode::kOutOfMemory, "test device: ", bytes, " bytes refused");
    allocated_ += bytes;
    return Buffer(data, bytes, [this, bytes](void* memory) {
      allocated_ -= bytes;
      std::free(memory);
    });
  }
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream) override {
    std::memcpy(device, host, static_cast<size_t>(bytes));
  }
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream) override {
    std::memcpy(host, device, static_cast<size_t>(bytes));
  }
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  void synchronize(Stream) override {}
  bool reads_host_memory() const override { return true; }
  Stream default_stream() override { return {}; }
  const Ops& ops() const override {
    fail(ErrorCode::kUnsupported, "the test device has no operations");
  }

  int64_t allocated_bytes() const { return allocated_; }

 private:
  int64_t capacity_;
  int64_t allocated_ = 0;
};

}  // namespace dsv4::testing
