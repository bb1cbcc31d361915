// Kernels of the embedded code objects, loaded on a device.
#pragma once
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "backends/amd/hip_runtime.h"

namespace dsv4::amd {

/// Thread-safe. One for each device, never unloaded: launches find theirs by the current device.
class KernelTable {
 public:
  /// Loads the code objects of `architecture` on the current device. @throws Error kDeviceError.
  explicit KernelTable(const std::string& architecture);
  KernelTable(const KernelTable&) = delete;
  KernelTable& operator=(const KernelTable&) = delete;

  /// The function of an entry's symbol (kernel_name.h). @throws Error kInternal: no code object of
  /// this build has it.
  HipFunction find(const std::string& symbol);

  /// Of the calling thread's current device; open_hip_device has loaded it.
  static KernelTable& current();
  /// Loads the kernels of a device unless that has been done.
  static void load(int device, const std::string& architecture);

 private:
  std::string architecture_;
  std::vector<HipModule> modules_;
  std::mutex mutex_;
  std::unordered_map<std::string, HipFunction> functions_;
};

}  // namespace dsv4::amd
