// Devices of this process that operations run on: opened at first use, kept to its end.
#pragma once
#include <map>
#include <memory>
#include <mutex>

#include "dsv4/device.h"

namespace dsv4::python {

class OpenDevice {
 public:
  /// The device that `id` names. @throws Error kUnsupported with the reasons.
  static OpenDevice& get(const DeviceId& id);

  Device& device() { return *device_; }
  /// Held while an operation is launched: thread pools and scratch serve one call at a time.
  std::mutex& mutex() { return mutex_; }
  /// At least `bytes` that operations on `stream` share, in stream order. Growing waits for the
  /// stream. Call with the mutex held.
  std::byte* scratch(Stream stream, int64_t bytes);
  /// What a stream argument of Python means here: CPU operations use the device's thread pool.
  Stream stream(void* handle);

 private:
  explicit OpenDevice(std::unique_ptr<Device> device) : device_(std::move(device)) {}
  std::unique_ptr<Device> device_;
  std::mutex mutex_;
  std::map<void*, Buffer> scratch_;  // of a stream
};

}  // namespace dsv4::python
