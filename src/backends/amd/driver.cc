#include "backends/amd/driver.h"

#include <algorithm>
#include <string>
#include <vector>

#include "backends/amd/hip_runtime.h"
#include "core/fail.h"

namespace dsv4::amd {
namespace {

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// hipDeviceProp_t begins with the name of the device and holds the name of its architecture at a
// place that moved between versions: it is found by its text. The structure has grown to some 1.5
// KiB; the buffer has room for more.
constexpr size_t kPropertiesBytes = 16384;

std::optional<DeviceInfo> describe(const HipRuntime& hip, int index) {
  std::vector<char> properties(kPropertiesBytes, '\0');
  if (hip.get_device_properties(properties.data(), index) != kHipSuccess) return std::nullopt;
  properties.back() = '\0';
  constexpr std::string_view kGfx = "gfx";
  for (auto at = properties.begin();; ++at) {
    at = std::search(at, properties.end(), kGfx.begin(), kGfx.end());
    if (at == properties.end()) return std::nullopt;
    const std::optional<Capability> capability = parse_gfx_name(&*at);
    if (capability) return DeviceInfo{{Platform::kRocm, index}, properties.data(), *capability};
  }
}

DeviceSearch search() {
  DeviceSearch out;
  const HipRuntime* hip = find_hip_runtime(&out.why_none);
  if (hip == nullptr) return out;
  const auto refused = [&](const char* call, HipError code) {
    const char* text = hip->get_error_string(code);
    out.why_none = concat("no ROCm device: ", call,
                          " failed: ", text == nullptr ? "unknown error" : text, " (", code, ")");
    return out;
  };
  int count = 0;
  if (const HipError code = hip->init(0); code != kHipSuccess) return refused("hipInit", code);
  if (const HipError code = hip->get_device_count(&count); code != kHipSuccess)
    return refused("hipGetDeviceCount", code);
  for (int i = 0; i < count; ++i) {
    std::optional<DeviceInfo> device = describe(*hip, i);
    if (!device) {
      out.devices.clear();
      out.why_none = concat("rocm:", i, ": ", hip->file_name, " lists it but does not describe it");
      return out;
    }
    if (device->name.empty())
      device->name = concat("AMD GPU ", architecture_name(Platform::kRocm, device->capability));
    out.devices.push_back(std::move(*device));
  }
  if (count == 0) out.why_none = concat("no ROCm device: ", hip->file_name, " lists none");
  return out;
}

}  // namespace

std::optional<Capability> parse_gfx_name(std::string_view text) {
  if (!text.starts_with("gfx")) return std::nullopt;
  text.remove_prefix(3);
  text = text.substr(0, text.find(':'));
  if (text.size() < 3 || text.size() > 5) return std::nullopt;
  Capability out{0, hex_digit(text[text.size() - 2]), hex_digit(text.back())};
  for (char c : text.substr(0, text.size() - 2)) {
    if (c < '0' || c > '9') return std::nullopt;
    out.major = 10 * out.major + (c - '0');
  }
  if (out.major == 0 || out.minor < 0 || out.stepping < 0) return std::nullopt;
  return out;
}

DeviceSearch find_devices() {
  static const DeviceSearch result = search();
  return result;
}

}  // namespace dsv4::amd
