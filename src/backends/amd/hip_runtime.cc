#include "backends/amd/hip_runtime.h"

#include <dlfcn.h>

namespace dsv4::amd {
namespace {

constexpr const char* kLibraries[] = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"};

struct Loaded {
  HipRuntime table;
  std::string why_not;
};

class Loader {
 public:
  explicit Loader(void* library) : library_(library) {}
  template <typename F>
  void find(const char* symbol, F& function) {
    function = reinterpret_cast<F>(dlsym(library_, symbol));
    if (function == nullptr && missing_.empty()) missing_ = symbol;
  }
  /// The newer of two names of one function.
  template <typename F>
  void find(const char* newer, const char* older, F& function) {
    function = reinterpret_cast<F>(dlsym(library_, newer));
    if (function == nullptr) find(older, function);
  }
  const std::string& missing() const { return missing_; }

 private:
  void* library_;
  std::string missing_;
};

Loaded load() {
  Loaded out;
  HipRuntime& hip = out.table;
  void* library = nullptr;
  for (const char* name : kLibraries) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) continue;
    hip.file_name = name;
    break;
  }
  if (library == nullptr) {
    out.why_not = "no HIP runtime: libamdhip64.so.7, .6 or .5 not found";
    return out;
  }
  Loader from(library);
  from.find("hipInit", hip.init);
  from.find("hipGetErrorString", hip.get_error_string);
  from.find("hipGetLastError", hip.get_last_error);
  from.find("hipGetDeviceCount", hip.get_device_count);
  // The name of HIP 6 and later; the older one fills the older structure there.
  from.find("hipGetDevicePropertiesR0600", "hipGetDeviceProperties", hip.get_device_properties);
  from.find("hipGetDevice", hip.get_device);
  from.find("hipSetDevice", hip.set_device);
  from.find("hipMalloc", hip.malloc);
  from.find("hipFree", hip.free);
  from.find("hipMemGetInfo", hip.mem_get_info);
  from.find("hipMemcpyAsync", hip.memcpy_async);
  from.find("hipStreamCreateWithFlags", hip.stream_create_with_flags);
  from.find("hipStreamDestroy", hip.stream_destroy);
  from.find("hipStreamSynchronize", hip.stream_synchronize);
  from.find("hipModuleLoadData", hip.module_load_data);
  from.find("hipModuleGetFunction", hip.module_get_function);
  from.find("hipModuleLaunchKernel", hip.module_launch_kernel);
  from.find("hipStreamBeginCapture", hip.stream_begin_capture);
  from.find("hipStreamEndCapture", hip.stream_end_capture);
  from.find("hipGraphInstantiate", hip.graph_instantiate);
  from.find("hipGraphLaunch", hip.graph_launch);
  from.find("hipGraphDestroy", hip.graph_destroy);
  from.find("hipGraphExecDestroy", hip.graph_exec_destroy);
  if (!from.missing().empty())
    out.why_not = concat("no HIP runtime: ", hip.file_name, " lacks ", from.missing());
  return out;
}

}  // namespace

const HipRuntime* find_hip_runtime(std::string* why_not) {
  static const Loaded loaded = load();
  if (why_not != nullptr) *why_not = loaded.why_not;
  return loaded.why_not.empty() ? &loaded.table : nullptr;
}

const HipRuntime& hip_runtime() {
  const HipRuntime* table = find_hip_runtime();
  DSV4_CHECK(table != nullptr);
  return *table;
}

void check_hip(HipError code, const char* call) {
  if (code == kHipSuccess) return;
  const char* text = hip_runtime().get_error_string(code);
  int device = -1;
  hip_runtime().get_device(&device);
  fail(ErrorCode::kDeviceError, call, " failed on rocm:", device, ": ",
       text == nullptr ? "unknown error" : text, " (", code, ")");
}

}  // namespace dsv4::amd
