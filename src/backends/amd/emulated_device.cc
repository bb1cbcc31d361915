#include "backends/amd/emulated_device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "backends/amd/candidate_list.h"
#include "backends/gpu/executor_launch.h"
#include "core/fail.h"
#include "core/thread_pool.h"

namespace dsv4::amd {
namespace {

constexpr int64_t kAlignment = 256;

class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(int num_threads) : pool_(num_threads) {
    const char* forced = std::getenv("DSV4_KERNEL");
    forced_ = forced == nullptr ? "" : forced;
    ops_ = make_emulated_ops(gpu::LaneOrder::kForward, forced_);
  }

  DeviceId id() const override { return {Platform::kRocm, -1}; }
  std::string description() const override {
    std::string out = concat("AMD kernels, lane by lane on the CPU, ", pool_.num_threads(),
                             pool_.num_threads() == 1 ? " thread" : " threads");
    if (!forced_.empty()) out += concat(", DSV4_KERNEL=", forced_);
    return out;
  }
  Buffer allocate(int64_t bytes) override {
    DSV4_CHECK(bytes >= 0);
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, static_cast<size_t>(std::max<int64_t>(bytes, 1))) != 0) {
      fail(ErrorCode::kOutOfMemory, id().str(), ": ", bytes, " bytes could not be allocated");
    }
    return Buffer(data, bytes, [](void* pointer) { std::free(pointer); });
  }
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream) override {
    copy(device, host, bytes);
  }
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream) override {
    copy(host, device, bytes);
  }
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream) override {
    copy(to, from, bytes);
  }
  void synchronize(Stream) override {}
  bool reads_host_memory() const override { return false; }  // as on the device it stands for
  Stream default_stream() override { return {&pool_}; }
  int num_threads() const override { return pool_.num_threads(); }
  const Ops& ops() const override { return ops_; }

 private:
  static void copy(void* to, const void* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  ThreadPool pool_;
  Ops ops_;
  std::string forced_;
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
