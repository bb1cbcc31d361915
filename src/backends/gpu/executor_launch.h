// The launcher of operations that run on the executor: the stream carries a thread pool, as on the
// CPU.
#pragma once
#include "backends/gpu/platform.h"
#include "ops/ops.h"

namespace dsv4::gpu {

template <LaneOrder kOrder = LaneOrder::kForward>
class ExecutorLaunch {
 public:
  explicit ExecutorLaunch(const OpContext& context)
      : pool_(static_cast<ThreadPool*>(context.stream.handle)) {}
  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    execute<Kernel>(blocks, params, {.pool = pool_, .order = kOrder});
  }

 private:
  ThreadPool* pool_;
};

}  // namespace dsv4::gpu
