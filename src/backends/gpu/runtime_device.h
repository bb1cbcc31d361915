// A GPU behind a runtime of CUDA's shape: memory, copies and recorded steps, once for CUDA and HIP.
//
// `Runtime` names the calls; all but those marked noexcept throw Error when the runtime refuses:
//   Graph, GraphExec                                         handles
//   int current_device(), void set_device(int), void restore_device(int) noexcept
//   void* allocate(size_t)                                   null when there is no memory
//   void free(int device, void*) noexcept, MemoryUse memory_use() noexcept
//   void copy(void* to, const void* from, size_t, CopyKind, Stream), void synchronize(Stream)
//   void begin_capture(Stream), Graph end_capture(Stream), void abandon_capture(Stream) noexcept
//   GraphExec instantiate(Graph)                             takes the graph, also when it throws
//   void launch(GraphExec, Stream), void destroy(GraphExec) noexcept
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "attention/descriptor.h"
#include "core/fail.h"
#include "dsv4/backend.h"
#include "dsv4/device.h"
#include "ops/forced_candidates.h"

namespace dsv4::gpu {

enum class CopyKind { kToDevice, kToHost, kOnDevice };

struct MemoryUse {
  size_t free_bytes = 0, total_bytes = 0;
};

/// Makes `index` the device of the calling thread; the caller's choice comes back at the end.
template <typename Runtime>
class UseDevice {
 public:
  explicit UseDevice(int index) : before_(Runtime::current_device()), changed_(before_ != index) {
    if (changed_) Runtime::set_device(index);
  }
  ~UseDevice() {
    if (changed_) Runtime::restore_device(before_);
  }
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int before_;
  bool changed_;
};

/// A captured step as a graph that can be launched.
template <typename Runtime>
class RecordedGraph final : public RecordedWork {
 public:
  RecordedGraph(int device, typename Runtime::Graph graph)
      : device_(device), exec_(Runtime::instantiate(graph)) {}
  ~RecordedGraph() override { Runtime::destroy(exec_); }
  void launch(Stream stream) override {
    const UseDevice<Runtime> use(device_);
    Runtime::launch(exec_, stream);
  }

 private:
  int device_;
  typename Runtime::GraphExec exec_;
};

/// What a platform's device is besides its stream and its kernels.
template <typename Runtime>
class RuntimeDevice : public Device {
 public:
  RuntimeDevice(DeviceId id, const DeviceInfo& info) : id_(id), info_(info) {}

  DeviceId id() const final { return id_; }
  Buffer allocate(int64_t bytes) final {
    DSV4_CHECK(bytes >= 0);
    const UseDevice<Runtime> use(id_.index);
    void* data = Runtime::allocate(static_cast<size_t>(std::max<int64_t>(bytes, 1)));
    if (data == nullptr) {
      const MemoryUse memory = Runtime::memory_use();
      fail(ErrorCode::kOutOfMemory, id_.str(), ": ", bytes, " bytes could not be allocated, ",
           memory.free_bytes, " of ", memory.total_bytes, " are free");
    }
    return Buffer(data, bytes, [index = id_.index](void* memory) { Runtime::free(index, memory); });
  }
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream stream) final {
    copy(device, host, bytes, CopyKind::kToDevice, stream);
  }
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream stream) final {
    copy(host, device, bytes, CopyKind::kToHost, stream);
  }
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) final {
    copy(to, from, bytes, CopyKind::kOnDevice, stream);
  }
  void synchronize(Stream stream) final {
    const UseDevice<Runtime> use(id_.index);
    Runtime::synchronize(stream);
  }
  bool reads_host_memory() const final { return false; }
  bool can_record() const final { return true; }
  std::unique_ptr<RecordedWork> record(Stream stream, const std::function<void()>& body) final {
    const UseDevice<Runtime> use(id_.index);
    Runtime::begin_capture(stream);
    try {
      body();
    } catch (...) {
      Runtime::abandon_capture(stream);
      throw;
    }
    return std::make_unique<RecordedGraph<Runtime>>(id_.index, Runtime::end_capture(stream));
  }

 protected:
  /// "NVIDIA H200 (sm_90), kernels attend:sm90 linear:sm90 ...": of every family the best
  /// candidate.
  template <typename Candidate>
  std::string describe(std::span<const Candidate> candidates, std::string_view forced) const {
    return concat(info_.name, " (", architecture_name(id_.platform, info_.capability), ")",
                  describe_candidates(candidates, forced, [&](const Candidate& candidate) {
                    return candidate.why_not(info_.capability);
                  }));
  }

 private:
  void copy(void* to, const void* from, int64_t bytes, CopyKind kind, Stream stream) {
    if (bytes <= 0) return;
    const UseDevice<Runtime> use(id_.index);
    Runtime::copy(to, from, static_cast<size_t>(bytes), kind, stream);
  }

  DeviceId id_;
  DeviceInfo info_;
};

/// The device that `id` names among those found.
/// @throws Error kUnsupported: there is no such device.
inline const DeviceInfo& device_info(const DeviceSearch& search, DeviceId id) {
  if (id.index < 0 || static_cast<size_t>(id.index) >= search.devices.size()) {
    fail(ErrorCode::kUnsupported, id.str(), ": ",
         search.devices.empty() ? search.why_none
                                : concat("there are ", search.devices.size(), " devices"));
  }
  return search.devices[static_cast<size_t>(id.index)];
}

}  // namespace dsv4::gpu
