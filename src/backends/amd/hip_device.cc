#include "backends/amd/hip_device.h"

#include "backends/amd/driver.h"
#include "backends/amd/hip_runtime.h"
#include "backends/amd/kernel_table.h"
#include "backends/gpu/runtime_device.h"

namespace dsv4::amd {
namespace {

// The HIP runtime as gpu::RuntimeDevice calls it.
struct HipCalls {
  using Graph = HipGraph;
  using GraphExec = HipGraphExec;

  static int current_device() {
    int device = 0;
    DSV4_HIP(get_device(&device));
    return device;
  }
  static void set_device(int index) { DSV4_HIP(set_device(index)); }
  static void restore_device(int index) noexcept { hip_runtime().set_device(index); }
  static void* allocate(size_t bytes) {
    void* data = nullptr;
    const HipError code = hip_runtime().malloc(&data, bytes);
    if (code == kHipOutOfMemory) {
      hip_runtime().get_last_error();  // reported by the caller; later calls are not to blame
      return nullptr;
    }
    check_hip(code, "hipMalloc");
    return data;
  }
  static void free(int device, void* data) noexcept {
    const HipRuntime& hip = hip_runtime();
    int before = 0;
    hip.get_device(&before);
    hip.set_device(device);
    hip.free(data);
    hip.set_device(before);
  }
  static gpu::MemoryUse memory_use() noexcept {
    gpu::MemoryUse out;
    hip_runtime().mem_get_info(&out.free_bytes, &out.total_bytes);
    return out;
  }
  static void copy(void* to, const void* from, size_t bytes, gpu::CopyKind kind, Stream stream) {
    const int hip_kind = kind == gpu::CopyKind::kToDevice ? kHipHostToDevice
                         : kind == gpu::CopyKind::kToHost ? kHipDeviceToHost
                                                          : kHipDeviceToDevice;
    DSV4_HIP(memcpy_async(to, from, bytes, hip_kind, stream.handle));
  }
  static void synchronize(Stream stream) { DSV4_HIP(stream_synchronize(stream.handle)); }
  static void begin_capture(Stream stream) {
    DSV4_HIP(stream_begin_capture(stream.handle, kHipCaptureThreadLocal));
  }
  static Graph end_capture(Stream stream) {
    Graph graph = nullptr;
    DSV4_HIP(stream_end_capture(stream.handle, &graph));
    return graph;
  }
  static void abandon_capture(Stream stream) noexcept {
    Graph graph = nullptr;
    hip_runtime().stream_end_capture(stream.handle, &graph);
    if (graph != nullptr) hip_runtime().graph_destroy(graph);
    hip_runtime().get_last_error();
  }
  static GraphExec instantiate(Graph graph) {
    GraphExec exec = nullptr;
    const HipError code = hip_runtime().graph_instantiate(&exec, graph, nullptr, nullptr, 0);
    hip_runtime().graph_destroy(graph);
    check_hip(code, "hipGraphInstantiate");
    return exec;
  }
  static void launch(GraphExec exec, Stream stream) { DSV4_HIP(graph_launch(exec, stream.handle)); }
  static void destroy(GraphExec exec) noexcept { hip_runtime().graph_exec_destroy(exec); }
};

class HipDevice final : public gpu::RuntimeDevice<HipCalls> {
 public:
  HipDevice(int index, const DeviceInfo& info)
      : RuntimeDevice({Platform::kRocm, index}, info),
        forced_(forced_kernels()),
        ops_(make_ops(hip_candidates(), info.capability, forced_)) {
    DSV4_HIP(set_device(index));
    KernelTable::load(index, architecture_name(Platform::kRocm, info.capability));
    DSV4_HIP(stream_create_with_flags(&stream_, kHipStreamNonBlocking));
  }
  ~HipDevice() override { hip_runtime().stream_destroy(stream_); }

  std::string description() const override { return describe(hip_candidates(), forced_); }
  Stream default_stream() override { return {stream_}; }
  const Ops& ops() const override { return ops_; }

 private:
  std::string forced_;
  Ops ops_;
  HipStream stream_ = nullptr;
};

}  // namespace

std::unique_ptr<Device> open_hip_device(int index) {
  const DeviceSearch search = find_devices();
  return std::make_unique<HipDevice>(index, gpu::device_info(search, {Platform::kRocm, index}));
}

}  // namespace dsv4::amd
