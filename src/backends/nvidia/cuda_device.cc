#include "backends/nvidia/cuda_device.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>

#include "attention/descriptor.h"
#include "backends/nvidia/candidates.h"
#include "backends/nvidia/driver.h"
#include "backends/nvidia/limits.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "core/branches.h"

namespace dsv4::nvidia {
namespace {

// Makes `index` the device of the calling thread; the caller's choice comes back at the end.
class UseDevice {
 public:
  explicit UseDevice(int index) {
    DSV4_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != index) DSV4_CUDA_CHECK(cudaSetDevice(index));
    changed_ = before_ != index;
  }
  ~UseDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// An instantiated CUDA graph.
class RecordedGraph final : public RecordedWork {
 public:
  RecordedGraph(int device, cudaGraph_t graph) : device_(device) {
    const cudaError_t code = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    DSV4_CUDA_CHECK(code);
  }
  ~RecordedGraph() override { cudaGraphExecDestroy(exec_); }
  void launch(Stream stream) override {
    const UseDevice use(device_);
    DSV4_CUDA_CHECK(cudaGraphLaunch(exec_, stream_of(stream)));
  }

 private:
  int device_;
  cudaGraphExec_t exec_ = nullptr;
};

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

class CudaDevice final : public Device, public StreamBranches {
 public:
  CudaDevice(int index, const DeviceInfo& info) : index_(index), info_(info) {
    DSV4_CUDA_CHECK(cudaSetDevice(index));
    DSV4_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    const char* forced = std::getenv("DSV4_KERNEL");
    forced_ = forced == nullptr ? "" : forced;
    ops_ = make_ops(info.capability, forced_);
  }
  ~CudaDevice() override { cudaStreamDestroy(stream_); }

  DeviceId id() const override { return {Platform::kCuda, index_}; }
  std::string description() const override {
    std::string out =
        concat(info_.name, " (", architecture_name(Platform::kCuda, info_.capability), ")");
    std::string_view last_family;
    for (const Candidate& candidate : candidates()) {
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
    const cudaError_t code = cudaMalloc(&data, static_cast<size_t>(std::max<int64_t>(bytes, 1)));
    if (code == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // the failure is reported here; later launches are not to blame
      size_t free_bytes = 0, total_bytes = 0;
      cudaMemGetInfo(&free_bytes, &total_bytes);
      fail(ErrorCode::kOutOfMemory, id().str(), ": ", bytes, " bytes could not be allocated, ",
           free_bytes, " of ", total_bytes, " are free");
    }
    if (code != cudaSuccess) cuda_failed(code, "cudaMalloc", __FILE__, __LINE__);
    const int index = index_;
    return Buffer(data, bytes, [index](void* memory) {
      int before = 0;
      cudaGetDevice(&before);
      cudaSetDevice(index);
      cudaFree(memory);
      cudaSetDevice(before);
    });
  }
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream stream) override {
    copy(device, host, bytes, cudaMemcpyHostToDevice, stream);
  }
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream stream) override {
    copy(host, device, bytes, cudaMemcpyDeviceToHost, stream);
  }
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) override {
    copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  }
  void synchronize(Stream stream) override {
    const UseDevice use(index_);
    DSV4_CUDA_CHECK(cudaStreamSynchronize(stream_of(stream)));
  }
  bool reads_host_memory() const override { return false; }
  Stream default_stream() override { return {stream_}; }
  bool can_record() const override { return true; }
  std::unique_ptr<RecordedWork> record(Stream stream, const std::function<void()>& body) override {
    const UseDevice use(index_);
    cudaGraph_t graph = nullptr;
    DSV4_CUDA_CHECK(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal));
    try {
      body();
    } catch (...) {
      cudaStreamEndCapture(stream_of(stream), &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    DSV4_CUDA_CHECK(cudaStreamEndCapture(stream_of(stream), &graph));
    return std::make_unique<RecordedGraph>(index_, graph);
  }
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
  void copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, Stream stream) {
    if (bytes <= 0) return;
    const UseDevice use(index_);
    DSV4_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, stream_of(stream)));
  }

  int index_;
  DeviceInfo info_;
  cudaStream_t stream_ = nullptr;
  CudaBranches branches_;
  Ops ops_;
  std::string forced_;
};

}  // namespace

std::unique_ptr<Device> open_cuda_device(int index) {
  const DeviceSearch search = find_devices();
  if (index < 0 || static_cast<size_t>(index) >= search.devices.size()) {
    fail(ErrorCode::kUnsupported, "cuda:", index, ": ",
         search.devices.empty() ? search.why_none
                                : concat("there are ", search.devices.size(), " devices"));
  }
  return std::make_unique<CudaDevice>(index, search.devices[static_cast<size_t>(index)]);
}

}  // namespace dsv4::nvidia
