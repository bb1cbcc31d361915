// Starts kernels of the embedded code objects on the stream of an operation; a launcher as
// gpu/rowwise_ops.h wants it.
#pragma once
#include <limits>

#include "backends/amd/kernel_name.h"
#include "backends/amd/kernel_table.h"
#include "ops/ops.h"

namespace dsv4::amd {

class HipLaunch {
 public:
  static constexpr bool kBf16Only = true;  // as the descriptor's activations
  explicit HipLaunch(const OpContext& context)
      : stream_(context.stream.handle), kernels_(KernelTable::current()) {}

  /// An empty grid is no launch.
  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    start(kernels_.find(gpu::amd_entry_name<Kernel>()), blocks, Kernel::kThreads, &params);
  }

 private:
  void start(HipFunction function, int64_t blocks, int threads, const void* params) const;

  HipStream stream_;
  KernelTable& kernels_;
};

}  // namespace dsv4::amd
