#include "devices.h"

#include "dsv4/backend.h"

namespace dsv4::python {

OpenDevice& OpenDevice::get(const DeviceId& id) {
  // Never destroyed: at exit drivers may already be gone.
  static auto& opened = *new std::map<std::pair<Platform, int>, std::unique_ptr<OpenDevice>>();
  static auto& mutex = *new std::mutex();
  const std::lock_guard lock(mutex);
  std::unique_ptr<OpenDevice>& entry = opened[{id.platform, id.index}];
  if (entry == nullptr) entry.reset(new OpenDevice(open_device(id, 0)));
  return *entry;
}

std::byte* OpenDevice::scratch(Stream stream, int64_t bytes) {
  Buffer& buffer = scratch_[stream.handle];
  if (buffer.bytes() < bytes) {
    if (buffer) device_->synchronize(stream);
    buffer.reset();
    buffer = device_->allocate(bytes);
  }
  return buffer.data();
}

Stream OpenDevice::stream(void* handle) {
  return device_->id().platform == Platform::kCpu ? device_->default_stream() : Stream{handle};
}

}  // namespace dsv4::python
