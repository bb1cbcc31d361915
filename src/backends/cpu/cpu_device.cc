#include "backends/cpu/cpu_device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "backends/cpu/candidates.h"
#include "backends/cpu/limits.h"
#include "core/fail.h"
#include "core/thread_pool.h"

namespace dsv4::cpu {
namespace {

// Large pages are aligned to 2 MiB so that the kernel can back them with huge ones.
constexpr int64_t kAlignment = 256;

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(':');
    if (colon != std::string::npos && colon + 2 < line.size()) return line.substr(colon + 2);
  }
  return "CPU";
}

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int num_threads) : pool_(num_threads) {
    const char* forced = std::getenv("DSV4_KERNEL");
    forced_ = forced == nullptr ? "" : forced;
    ops_ = make_ops(forced_);
  }

  DeviceId id() const override { return {Platform::kCpu, 0}; }
  std::string description() const override {
    std::string out = concat(cpu_name(), ", ", pool_.num_threads(),
                             pool_.num_threads() == 1 ? " thread" : " threads");
    std::string_view last_family;
    for (const Candidate& candidate : candidates()) {
      if (candidate.family == last_family || !candidate.why_not().empty()) continue;
      out +=
          concat(last_family.empty() ? ", kernels " : " ", candidate.family, ":", candidate.name);
      last_family = candidate.family;
    }
    if (!forced_.empty()) out += concat(", DSV4_KERNEL=", forced_);
    return out;
  }
  Buffer allocate(int64_t bytes) override {
    DSV4_CHECK(bytes >= 0);
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, static_cast<size_t>(std::max<int64_t>(bytes, 1))) != 0) {
      fail(ErrorCode::kOutOfMemory, "cpu: ", bytes, " bytes could not be allocated");
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
  bool reads_host_memory() const override { return true; }
  Stream default_stream() override { return {&pool_}; }
  int num_threads() const override { return pool_.num_threads(); }
  const Ops& ops() const override { return ops_; }
  DeviceLimits measure_limits() override { return cpu::measure_limits(pool_); }

 private:
  static void copy(void* to, const void* from, int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  ThreadPool pool_;
  Ops ops_;
  std::string forced_;
};

}  // namespace

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
