// A device whose memory is the host's: what the CPU and the executor of GPU kernels share.
#pragma once
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/fail.h"
#include "core/host_memory.h"
#include "core/thread_pool.h"
#include "dsv4/device.h"

namespace dsv4 {

class HostDevice : public Device {
 public:
  explicit HostDevice(int num_threads) : pool_(num_threads) {}

  Buffer allocate(int64_t bytes) final {
    DSV4_CHECK(bytes >= 0);
    void* data = allocate_host_memory(bytes);
    if (data == nullptr) {
      fail(ErrorCode::kOutOfMemory, id().str(), ": ", bytes, " bytes could not be allocated");
    }
    return Buffer(data, bytes, [](void* pointer) { std::free(pointer); });
  }
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream) final {
    copy(device, host, bytes);
  }
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream) final {
    copy(host, device, bytes);
  }
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream) final {
    copy(to, from, bytes);
  }
  void synchronize(Stream) final {}
  Stream default_stream() final { return {&pool_}; }
  int num_threads() const final { return pool_.num_threads(); }

 protected:
  ThreadPool& pool() { return pool_; }
  /// "AMD EPYC, 2 threads".
  std::string with_threads(std::string_view name) const {
    return concat(name, ", ", num_threads(), num_threads() == 1 ? " thread" : " threads");
  }

 private:
  static void copy(void* to, const void* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  ThreadPool pool_;
};

}  // namespace dsv4
