#include "backends/amd/hip_device.h"

#include <algorithm>
#include <cstdlib>

#include "attention/descriptor.h"
#include "backends/amd/driver.h"
#include "backends/amd/hip_runtime.h"
#include "backends/amd/kernel_table.h"

namespace dsv4::amd {
namespace {

// Makes `index` the device of the calling thread; the caller's choice comes back at the end.
class UseDevice {
 public:
  explicit UseDevice(int index) {
    DSV4_HIP(get_device(&before_));
    if (before_ != index) DSV4_HIP(set_device(index));
    changed_ = before_ != index;
  }
  ~UseDevice() {
    if (changed_) hip_runtime().set_device(before_);
  }
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class RecordedGraph final : public RecordedWork {
 public:
  RecordedGraph(int device, HipGraph graph) : device_(device) {
    const HipError code = hip_runtime().graph_instantiate(&exec_, graph, nullptr, nullptr, 0);
    hip_runtime().graph_destroy(graph);
    check_hip(code, "hipGraphInstantiate");
  }
  ~RecordedGraph() override { hip_runtime().graph_exec_destroy(exec_); }
  void launch(Stream stream) override {
    const UseDevice use(device_);
    DSV4_HIP(graph_launch(exec_, stream.handle));
  }

 private:
  int device_;
  HipGraphExec exec_ = nullptr;
};

class HipDevice final : public Device {
 public:
  HipDevice(int index, const DeviceInfo& info) : index_(index), info_(info) {
    const char* forced = std::getenv("DSV4_KERNEL");
    forced_ = forced == nullptr ? "" : forced;
    ops_ = make_ops(hip_candidates(), info.capability, forced_);
    DSV4_HIP(set_device(index));
    KernelTable::load(index, architecture_name(Platform::kRocm, info.capability));
    DSV4_HIP(stream_create_with_flags(&stream_, kHipStreamNonBlocking));
  }
  ~HipDevice() override { hip_runtime().stream_destroy(stream_); }

  DeviceId id() const override { return {Platform::kRocm, index_}; }
  std::string description() const override {
    std::string out =
        concat(info_.name, " (", architecture_name(Platform::kRocm, info_.capability), ")");
    std::string_view last_family;
    for (const Candidate& candidate : hip_candidates()) {
      if (candidate.family == last_family || !candidate.why_not(info_.capability).empty()) continue;
      out +=
          concat(last_family.empty() ? ", kernels " : " ", candidate.family, ":", candidate.name);
      last_family = candidate.family;
    }
    if (!forced_.empty()) out += concat(", DSV4_KERNEL=", forced_);
    return out;
  }

  Buffer allocate(int64_t bytes) override {
    DSV4_CHECK(bytes >= 0);
    const UseDevice use(index_);
    void* data = nullptr;
    const HipError code =
        hip_runtime().malloc(&data, static_cast<size_t>(std::max<int64_t>(bytes, 1)));
    if (code == kHipOutOfMemory) {
      hip_runtime().get_last_error();  // the failure is reported here; later calls are not to blame
      size_t free_bytes = 0, total_bytes = 0;
      hip_runtime().mem_get_info(&free_bytes, &total_bytes);
      fail(ErrorCode::kOutOfMemory, id().str(), ": ", bytes, " bytes could not be allocated, ",
           free_bytes, " of ", total_bytes, " are free");
    }
    check_hip(code, "hipMalloc");
    const int index = index_;
    return Buffer(data, bytes, [index](void* memory) {
      const HipRuntime& hip = hip_runtime();
      int before = 0;
      hip.get_device(&before);
      hip.set_device(index);
      hip.free(memory);
      hip.set_device(before);
    });
  }
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream stream) override {
    copy(device, host, bytes, kHipHostToDevice, stream);
  }
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream stream) override {
    copy(host, device, bytes, kHipDeviceToHost, stream);
  }
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) override {
    copy(to, from, bytes, kHipDeviceToDevice, stream);
  }
  void synchronize(Stream stream) override {
    const UseDevice use(index_);
    DSV4_HIP(stream_synchronize(stream.handle));
  }
  bool reads_host_memory() const override { return false; }
  Stream default_stream() override { return {stream_}; }
  bool can_record() const override { return true; }
  std::unique_ptr<RecordedWork> record(Stream stream, const std::function<void()>& body) override {
    const UseDevice use(index_);
    HipGraph graph = nullptr;
    DSV4_HIP(stream_begin_capture(stream.handle, kHipCaptureThreadLocal));
    try {
      body();
    } catch (...) {
      hip_runtime().stream_end_capture(stream.handle, &graph);
      if (graph != nullptr) hip_runtime().graph_destroy(graph);
      hip_runtime().get_last_error();
      throw;
    }
    DSV4_HIP(stream_end_capture(stream.handle, &graph));
    return std::make_unique<RecordedGraph>(index_, graph);
  }
  const Ops& ops() const override { return ops_; }

 private:
  void copy(void* to, const void* from, int64_t bytes, int kind, Stream stream) {
    if (bytes <= 0) return;
    const UseDevice use(index_);
    DSV4_HIP(memcpy_async(to, from, static_cast<size_t>(bytes), kind, stream.handle));
  }

  int index_;
  DeviceInfo info_;
  HipStream stream_ = nullptr;
  Ops ops_;
  std::string forced_;
};

}  // namespace

std::unique_ptr<Device> open_hip_device(int index) {
  const DeviceSearch search = find_devices();
  if (index < 0 || static_cast<size_t>(index) >= search.devices.size()) {
    fail(ErrorCode::kUnsupported, "rocm:", index, ": ",
         search.devices.empty() ? search.why_none
                                : concat("there are ", search.devices.size(), " devices"));
  }
  return std::make_unique<HipDevice>(index, search.devices[static_cast<size_t>(index)]);
}

}  // namespace dsv4::amd
