#include "backends/nvidia/cuda_device.h"

#include <array>
#include <map>
#include <mutex>

#include "backends/gpu/runtime_device.h"
#include "backends/nvidia/candidates.h"
#include "backends/nvidia/driver.h"
#include "backends/nvidia/limits.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "core/branches.h"

namespace dsv4::nvidia {
namespace {

// The CUDA runtime as gpu::RuntimeDevice calls it.
struct CudaRuntime {
  using Graph = cudaGraph_t;
  using GraphExec = cudaGraphExec_t;

  static int current_device() {
    int device = 0;
    DSV4_CUDA_CHECK(cudaGetDevice(&device));
    return device;
  }
  static void set_device(int index) { DSV4_CUDA_CHECK(cudaSetDevice(index)); }
  static void restore_device(int index) noexcept { cudaSetDevice(index); }
  static void* allocate(size_t bytes) {
    void* data = nullptr;
    const cudaError_t code = cudaMalloc(&data, bytes);
    if (code == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // the failure is reported by the caller; later launches are not to blame
      return nullptr;
    }
    if (code != cudaSuccess) cuda_failed(code, "cudaMalloc", __FILE__, __LINE__);
    return data;
  }
  static void free(int device, void* data) noexcept {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaFree(data);
    cudaSetDevice(before);
  }
  static gpu::MemoryUse memory_use() noexcept {
    gpu::MemoryUse out;
    cudaMemGetInfo(&out.free_bytes, &out.total_bytes);
    return out;
  }
  static void copy(void* to, const void* from, size_t bytes, gpu::CopyKind kind, Stream stream) {
    const cudaMemcpyKind cuda_kind = kind == gpu::CopyKind::kToDevice ? cudaMemcpyHostToDevice
                                     : kind == gpu::CopyKind::kToHost ? cudaMemcpyDeviceToHost
                                                                      : cudaMemcpyDeviceToDevice;
    DSV4_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cuda_kind, stream_of(stream)));
  }
  static void synchronize(Stream stream) {
    DSV4_CUDA_CHECK(cudaStreamSynchronize(stream_of(stream)));
  }
  static void begin_capture(Stream stream) {
    DSV4_CUDA_CHECK(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal));
  }
  static Graph end_capture(Stream stream) {
    Graph graph = nullptr;
    DSV4_CUDA_CHECK(cudaStreamEndCapture(stream_of(stream), &graph));
    return graph;
  }
  static void abandon_capture(Stream stream) noexcept {
    Graph graph = nullptr;
    cudaStreamEndCapture(stream_of(stream), &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
  }
  static GraphExec instantiate(Graph graph) {
    GraphExec exec = nullptr;
    const cudaError_t code = cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    DSV4_CUDA_CHECK(code);
    return exec;
  }
  static void launch(GraphExec exec, Stream stream) {
    DSV4_CUDA_CHECK(cudaGraphLaunch(exec, stream_of(stream)));
  }
  static void destroy(GraphExec exec) noexcept { cudaGraphExecDestroy(exec); }
};

using UseDevice = gpu::UseDevice<CudaRuntime>;

// Branches of streams: a stream and an event for each, made when first asked for.
class CudaBranches {
 public:
  CudaBranches() = default;
  CudaBranches(const CudaBranches&) = delete;
  CudaBranches& operator=(const CudaBranches&) = delete;
  ~CudaBranches() {
    for (const auto& [stream, branches] : branches_) {
      for (const Branch& branch : branches) {
        if (branch.stream == nullptr) continue;
        cudaStreamDestroy(branch.stream);
        cudaEventDestroy(branch.event);
      }
    }
  }
  cudaStream_t fork(cudaStream_t stream, int index) {
    const std::lock_guard lock(mutex_);
    const Branch& branch = branch_of(stream, index);
    wait(branch.event, stream, branch.stream);
    return branch.stream;
  }
  void join(cudaStream_t stream, int index) {
    const std::lock_guard lock(mutex_);
    const Branch& branch = branch_of(stream, index);
    wait(branch.event, branch.stream, stream);
  }

 private:
  struct Branch {
    cudaStream_t stream = nullptr;
    cudaEvent_t event = nullptr;
  };
  // All branches of a stream are made together: the first one is asked for in a step that runs,
  // others perhaps in one that is recorded.
  const Branch& branch_of(cudaStream_t stream, int index) {
    DSV4_CHECK(index >= 0 && index < StreamBranches::kMaxBranches);
    auto& branches = branches_[stream];
    for (Branch& branch : branches) {
      if (branch.stream != nullptr) break;
      DSV4_CUDA_CHECK(cudaEventCreateWithFlags(&branch.event, cudaEventDisableTiming));
      DSV4_CUDA_CHECK(cudaStreamCreateWithFlags(&branch.stream, cudaStreamNonBlocking));
    }
    return branches[static_cast<size_t>(index)];
  }
  // Work of `later` from now on waits for what is on `earlier` by now.
  static void wait(cudaEvent_t event, cudaStream_t earlier, cudaStream_t later) {
    DSV4_CUDA_CHECK(cudaEventRecord(event, earlier));
    DSV4_CUDA_CHECK(cudaStreamWaitEvent(later, event, 0));
  }

  std::mutex mutex_;  // an event is recorded and waited for by one thread at a time
  std::map<cudaStream_t, std::array<Branch, StreamBranches::kMaxBranches>> branches_;
};

class CudaDevice final : public gpu::RuntimeDevice<CudaRuntime>, public StreamBranches {
 public:
  CudaDevice(int index, const DeviceInfo& info)
      : RuntimeDevice({Platform::kCuda, index}, info),
        index_(index),
        forced_(forced_kernels()),
        ops_(make_ops(info.capability, forced_)) {
    DSV4_CUDA_CHECK(cudaSetDevice(index));
    DSV4_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~CudaDevice() override { cudaStreamDestroy(stream_); }

  std::string description() const override { return describe(candidates(), forced_); }
  Stream default_stream() override { return {stream_}; }
  Stream fork(Stream stream, int branch) override {
    const UseDevice use(index_);
    return {branches_.fork(stream_of(stream), branch)};
  }
  void join(Stream stream, int branch) override {
    const UseDevice use(index_);
    branches_.join(stream_of(stream), branch);
  }
  const Ops& ops() const override { return ops_; }
  DeviceLimits measure_limits() override {
    const UseDevice use(index_);
    return nvidia::measure_limits(*this);
  }

 private:
  int index_;
  std::string forced_;
  Ops ops_;
  cudaStream_t stream_ = nullptr;
  CudaBranches branches_;
};

}  // namespace

std::unique_ptr<Device> open_cuda_device(int index) {
  const DeviceSearch search = find_devices();
  return std::make_unique<CudaDevice>(index, gpu::device_info(search, {Platform::kCuda, index}));
}

}  // namespace dsv4::nvidia
