#include "backends/amd/driver.h"

#include <dlfcn.h>

#include <fstream>

#include "core/fail.h"

namespace dsv4::amd {
namespace {

constexpr const char* kTopology = "/sys/class/kfd/kfd/topology";
constexpr const char* kLibraries[] = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"};

// Value of `key` in a file of "key value" lines; 0 when absent.
int64_t property(std::istream& file, const std::string& key) {
  std::string word;
  for (int64_t value = 0; file >> word >> value;) {
    if (word == key) return value;
  }
  return 0;
}

bool has_runtime() {
  for (const char* library : kLibraries) {
    if (dlopen(library, RTLD_NOW | RTLD_LOCAL) != nullptr) return true;
  }
  return false;
}

DeviceSearch search() {
  DeviceSearch out;
  if (!has_runtime()) {
    out.why_none = "no HIP runtime: libamdhip64.so.7, .6 or .5 not found";
    return out;
  }
  out.devices = read_topology(kTopology);
  if (out.devices.empty()) out.why_none = concat("no ROCm device: ", kTopology, " lists no GPU");
  return out;
}

}  // namespace

std::vector<DeviceInfo> read_topology(const std::string& folder) {
  std::vector<DeviceInfo> out;
  for (int node = 0;; ++node) {
    std::ifstream file(concat(folder, "/nodes/", node, "/properties"));
    if (!file) return out;
    // Two decimal digits each for minor and stepping: 90402 is gfx942, 90010 is gfx90a.
    const int64_t version = property(file, "gfx_target_version");
    if (version <= 0 || version >= 1000000) continue;
    const Capability capability{static_cast<int>(version / 10000),
                                static_cast<int>(version / 100 % 100),
                                static_cast<int>(version % 100)};
    const int index = static_cast<int>(out.size());
    out.push_back({{Platform::kRocm, index},
                   concat("AMD GPU ", architecture_name(Platform::kRocm, capability)),
                   capability});
  }
}

DeviceSearch find_devices() {
  static const DeviceSearch result = search();
  return result;
}

}  // namespace dsv4::amd
