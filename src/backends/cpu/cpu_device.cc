#include "backends/cpu/cpu_device.h"

#include <algorithm>
#include <fstream>
#include <thread>

#include "backends/cpu/candidates.h"
#include "backends/cpu/limits.h"
#include "core/fail.h"
#include "core/host_device.h"
#include "ops/forced_candidates.h"

namespace dsv4::cpu {
namespace {

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(':');
    if (colon != std::string::npos && colon + 2 < line.size()) return line.substr(colon + 2);
  }
  return "CPU";
}

std::string describe_kernels(std::string_view forced) {
  return describe_candidates(candidates(), forced,
                             [](const Candidate& candidate) { return candidate.why_not(); });
}

class CpuDevice final : public HostDevice {
 public:
  explicit CpuDevice(int num_threads)
      : HostDevice(num_threads), forced_(forced_kernels()), ops_(make_ops(forced_)) {}

  DeviceId id() const override { return {Platform::kCpu, 0}; }
  std::string description() const override {
    return concat(with_threads(cpu_name()), describe_kernels(forced_));
  }
  bool reads_host_memory() const override { return true; }
  const Ops& ops() const override { return ops_; }
  DeviceLimits measure_limits() override { return cpu::measure_limits(pool()); }

 private:
  std::string forced_;
  Ops ops_;
};

}  // namespace

std::string describe_cpu() {
  return concat(cpu_name(), describe_kernels(forced_kernels()));
}

std::unique_ptr<Device> open_cpu_device(int num_threads) {
  constexpr int kMaxThreads = 1024;
  if (num_threads < 0 || num_threads > kMaxThreads) {
    fail(ErrorCode::kInvalidArgument, "cpu: ", num_threads, " threads, expected 1 to ", kMaxThreads,
         " (or 0 for all cores)");
  }
  if (num_threads == 0)
    num_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return std::make_unique<CpuDevice>(num_threads);
}

}  // namespace dsv4::cpu
