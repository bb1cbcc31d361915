// Devices, streams and the memory that belongs to them. Part of the public API: engines choose a
// device by name and may pass their own stream; kernels and drivers stay hidden behind it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "dsv4/tensor.h"

namespace dsv4 {

struct Ops;  // src/ops/ops.h: the operations of a device

enum class Platform : uint8_t { kCpu, kCuda, kRocm };
const char* platform_name(Platform platform);

/// "cpu", "cuda:0", "rocm:1", "rocm:emulated" (index -1).
struct DeviceId {
  Platform platform = Platform::kCpu;
  int index = 0;
  bool operator==(const DeviceId&) const = default;
  std::string str() const;
  /// @throws Error kInvalidArgument with the accepted forms.
  static DeviceId parse(std::string_view text);
};

/// Order of execution on a device. A value: `handle` is a cudaStream_t / hipStream_t, or on the CPU
/// the thread pool. A default-constructed stream on the CPU runs in the calling thread.
struct Stream {
  void* handle = nullptr;
};

/// Memory of a device, freed with its owner. Move-only.
class Buffer {
 public:
  using Deleter = std::function<void(void*)>;
  Buffer() = default;
  Buffer(void* data, int64_t bytes, Deleter deleter)
      : data_(data), bytes_(bytes), deleter_(std::move(deleter)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { reset(); }
  void reset();
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  int64_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Deleter deleter_;
};

/// What a device can do at best, as measured on it: the yardstick of benchmarks.
struct DeviceLimits {
  double read_bytes_per_second = 0;  ///< a read stream far larger than any cache, all threads
  double f32_flops_per_second = 0;   ///< register-resident f32 FMA
  double bf16_flops_per_second =
      0;  ///< register-resident bf16 dot products; 0 where there is no such instruction
  double peak_flops_per_second() const {
    return f32_flops_per_second > bf16_flops_per_second ? f32_flops_per_second
                                                        : bf16_flops_per_second;
  }
};

/// Recorded work of a stream: one launch replays it with the same addresses, grids and host
/// numbers.
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  /// Enqueues everything that was recorded. @throws Error kDeviceError.
  virtual void launch(Stream stream) = 0;
};

/// A place where weights, caches and steps live. Made by `open_device` (dsv4/backend.h).
class Device {
 public:
  virtual ~Device() = default;
  virtual DeviceId id() const = 0;
  /// For people: "AMD EPYC, 2 threads, avx512bf16".
  virtual std::string description() const = 0;
  /// Uninitialised memory, aligned to 256 bytes or more. @throws Error kOutOfMemory naming the size
  /// and what was free.
  virtual Buffer allocate(int64_t bytes) = 0;
  /// Copies between host and device memory in stream order; host memory must stay valid until the
  /// stream has passed.
  virtual void copy_to_device(void* device, const void* host, int64_t bytes, Stream stream) = 0;
  virtual void copy_to_host(void* host, const void* device, int64_t bytes, Stream stream) = 0;
  /// Between two places of this device, in stream order. Ranges do not overlap.
  virtual void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) = 0;
  virtual void synchronize(Stream stream) = 0;
  /// True when kernels may read host memory directly (CPU): weights are then used in place, mapped
  /// from the file.
  virtual bool reads_host_memory() const = 0;
  virtual Stream default_stream() = 0;
  virtual bool can_record() const { return false; }
  /// Records what `body` enqueues on `stream`, without running it; null where the device cannot.
  /// `body` must not wait for the device, allocate, or copy host memory, and should have run once
  /// before (kernels are loaded when first used).
  /// @throws Error kDeviceError; what `body` throws.
  virtual std::unique_ptr<RecordedWork> record(Stream stream, const std::function<void()>& body) {
    (void)stream, (void)body;
    return nullptr;
  }
  /// Host threads that operations of this device use; scratch memory depends on it.
  virtual int num_threads() const { return 1; }
  virtual const Ops& ops() const = 0;
  /// Takes about half a second. Zeros where a device cannot tell.
  virtual DeviceLimits measure_limits() { return {}; }
};

}  // namespace dsv4
