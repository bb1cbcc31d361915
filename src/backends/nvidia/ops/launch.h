// Starting kernels on the stream of an operation.
//
// On sm_90 and later a kernel starts before the one before it on the stream has ended, so that
// launches cost little (programmatic dependent launch). Each begins with follow_kernels_before(),
// or with its two halves. Products ask for weights, which no kernel writes, before they wait; those
// of few tokens and attention in clusters let the next kernel start only when they have asked for
// all that they read, as what it asks for would stand in front of it. Others let it start at once.
// Attention finds the rows of ranges before it waits, from a step's plan: between what writes a
// plan and attention stands at least one kernel that begins with follow_kernels_before(). The
// compressor's second launch reads what its first one does not write before it waits: that one has
// waited before it let it start, and must go on doing so. After the wait what a kernel reads is
// complete, also if it stems from kernels further back: each of them has waited for those before
// it.
#pragma once
#include <array>
#include <atomic>

#include "backends/gpu/platform.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "ops/ops.h"

namespace dsv4::nvidia {

/// Lets the next kernel start, as soon as all blocks have said so or ended.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  sm90::start_next_kernel();
#endif
}
/// By all threads that read or write what other kernels do: waits for the end of the kernels
/// before.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  sm90::wait_for_kernels_before();
#endif
}
/// By all threads, before anything is written, or read that a kernel may still write. In this order
/// at most one kernel waits: more of them would take the room of those on other streams.
__device__ __forceinline__ void follow_kernels_before() {
  wait_for_kernels_before();
  start_next_kernel();
}

/// A positive number that a device has, asked of it once: a query may not stand in a step.
class PerDevice {
 public:
  template <typename Ask>  // int ask(int device)
  int get(Ask ask) {
    int device = 0;
    DSV4_CUDA_CHECK(cudaGetDevice(&device));
    std::atomic<int>& known = known_[static_cast<size_t>(device) % known_.size()];
    int value = known.load(std::memory_order_relaxed);
    if (value == 0) known.store(value = ask(device), std::memory_order_relaxed);
    return value;
  }

 private:
  std::array<std::atomic<int>, 64> known_{};
};

inline int num_multiprocessors() {
  static PerDevice known;
  return known.get([](int device) {
    int count = 0;
    DSV4_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  });
}

/// Kernels with more than 48 KiB of dynamic shared memory must say so, once per device; a host call
/// of a microsecond that may stand in a captured stream.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, int64_t bytes) {
  constexpr int64_t kFree = 48 << 10;
  if (bytes <= kFree) return;
  DSV4_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)));
}

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  int64_t shared_bytes = 0;  ///< dynamic
  unsigned cluster = 1;      ///< blocks along x
};

/// Starts `kernel`, a function that begins with follow_kernels_before() or its halves.
/// @throws Error kDeviceError: the launch is refused.
template <auto kKernel, typename... Args>
void launch(const LaunchShape& shape, cudaStream_t stream, const Args&... args) {
  allow_shared_memory(kKernel, shape.shared_bytes);
  if (shape.cluster > 8) {
    DSV4_CUDA_CHECK(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  // Code for older GPUs, compiled there from PTX, lacks the instructions of follow_kernels_before.
  static PerDevice code;
  const int ptx_version = code.get([](int) {
    cudaFuncAttributes kernel{};
    DSV4_CUDA_CHECK(cudaFuncGetAttributes(&kernel, reinterpret_cast<const void*>(kKernel)));
    return kernel.ptxVersion;
  });
  if (ptx_version >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
  }
  DSV4_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, args...));
}

// ---- kernels of backends/gpu

/// `Kernel::kMinBlocks`, if it has one: blocks that a multiprocessor holds at least, a bound of
/// registers.
template <typename Kernel>
constexpr int min_blocks() {
  if constexpr (requires { Kernel::kMinBlocks; }) {
    return Kernel::kMinBlocks;
  } else {
    return 1;
  }
}
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, min_blocks<Kernel>())
    cuda_entry(const __grid_constant__ typename Kernel::Params params) {
  follow_kernels_before();
  Kernel::run(params);
}

class CudaLaunch {
 public:
  static constexpr bool kOwnCompressor = true;  ///< rowwise_compress.cu
  static constexpr bool kWritesCodes = true;    ///< rms_norm, inverse_rope, index_query
  explicit CudaLaunch(const OpContext& context) : stream_(stream_of(context.stream)) {}
  /// An empty grid is no launch.
  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    if (blocks == 0) return;
    launch<cuda_entry<Kernel>>({dim3(static_cast<unsigned>(blocks)), Kernel::kThreads}, stream_,
                               params);
  }

 private:
  cudaStream_t stream_;
};

}  // namespace dsv4::nvidia
