#include "backends/amd/emulated_device.h"

#include <algorithm>
#include <thread>

#include "backends/amd/candidate_list.h"
#include "backends/gpu/executor_launch.h"
#include "core/host_device.h"
#include "ops/forced_candidates.h"

namespace dsv4::amd {
namespace {

class EmulatedDevice final : public HostDevice {
 public:
  explicit EmulatedDevice(int num_threads)
      : HostDevice(num_threads),
        forced_(forced_kernels()),
        ops_(make_emulated_ops(gpu::LaneOrder::kForward, forced_)) {}

  DeviceId id() const override { return {Platform::kRocm, -1}; }
  std::string description() const override {
    return concat(with_threads("AMD kernels, lane by lane on the CPU"),
                  forced_.empty() ? "" : concat(", DSV4_KERNEL=", forced_));
  }
  bool reads_host_memory() const override { return false; }  // as on the device it stands for
  const Ops& ops() const override { return ops_; }

 private:
  std::string forced_;
  Ops ops_;
};

}  // namespace

std::span<const Candidate> emulated_candidates(gpu::LaneOrder order) {
  return order == gpu::LaneOrder::kForward
             ? candidates<gpu::ExecutorLaunch<gpu::LaneOrder::kForward>>()
             : candidates<gpu::ExecutorLaunch<gpu::LaneOrder::kReverse>>();
}

Ops make_emulated_ops(gpu::LaneOrder order, std::string_view forced) {
  return make_ops(emulated_candidates(order), kEmulated, forced);
}

std::unique_ptr<Device> open_emulated_device(int num_threads) {
  constexpr int kMaxThreads = 1024;
  if (num_threads < 0 || num_threads > kMaxThreads) {
    fail(ErrorCode::kInvalidArgument, "rocm:emulated: ", num_threads, " threads, expected 1 to ",
         kMaxThreads, " (or 0 for all cores)");
  }
  if (num_threads == 0)
    num_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return std::make_unique<EmulatedDevice>(num_threads);
}

}  // namespace dsv4::amd
