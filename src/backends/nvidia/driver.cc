#include "backends/nvidia/driver.h"

#include <dlfcn.h>

#include "core/fail.h"

namespace dsv4::nvidia {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

// CUdevice_attribute, fixed by the driver's ABI (CUDA Driver API, section 6.1).
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;

struct Driver {
  int (*init)(unsigned) = nullptr;
  int (*get_count)(int*) = nullptr;
  int (*get)(int*, int) = nullptr;
  int (*get_name)(char*, int, int) = nullptr;
  int (*get_attribute)(int*, int, int) = nullptr;
  int (*get_error_string)(int, const char**) = nullptr;

  std::string error(const char* call, int code) const {
    const char* text = nullptr;
    get_error_string(code, &text);
    return concat(call, " failed: ", text == nullptr ? "unknown error" : text, " (", code, ")");
  }
};

template <typename F>
bool find(void* library, const char* symbol, F& function) {
  function = reinterpret_cast<F>(dlsym(library, symbol));
  return function != nullptr;
}

// The library stays loaded: a driver that has been started does not survive being unmapped.
DeviceSearch search() {
  DeviceSearch out;
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    out.why_none = concat("no CUDA driver: ", kLibrary, " not found");
    return out;
  }
  Driver driver;
  if (!find(library, "cuInit", driver.init) ||
      !find(library, "cuDeviceGetCount", driver.get_count) ||
      !find(library, "cuDeviceGet", driver.get) ||
      !find(library, "cuDeviceGetName", driver.get_name) ||
      !find(library, "cuDeviceGetAttribute", driver.get_attribute) ||
      !find(library, "cuGetErrorString", driver.get_error_string)) {
    out.why_none = concat("no CUDA driver: ", kLibrary, " lacks functions of the driver API");
    return out;
  }
  int count = 0;
  if (const int code = driver.init(0); code != 0) {
    out.why_none = concat("no CUDA device: ", driver.error("cuInit", code));
    return out;
  }
  if (const int code = driver.get_count(&count); code != 0) {
    out.why_none = concat("no CUDA device: ", driver.error("cuDeviceGetCount", code));
    return out;
  }
  for (int i = 0; i < count; ++i) {
    int device = 0;
    char name[256] = "";
    Capability capability;
    if (driver.get(&device, i) != 0 || driver.get_name(name, sizeof name, device) != 0 ||
        driver.get_attribute(&capability.major, kAttributeMajor, device) != 0 ||
        driver.get_attribute(&capability.minor, kAttributeMinor, device) != 0) {
      out.why_none = concat("cuda:", i, ": the driver lists it but does not describe it");
      out.devices.clear();
      return out;
    }
    out.devices.push_back({{Platform::kCuda, i}, name, capability});
  }
  if (count == 0) out.why_none = "no CUDA device: the driver lists none";
  return out;
}

}  // namespace

DeviceSearch find_devices() {
  static const DeviceSearch result = search();
  return result;
}

}  // namespace dsv4::nvidia
