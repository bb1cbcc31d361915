// A libamdhip64 for tests: devices that do not exist, memory on the host, and launches that execute
// the compiled kernels in the interpreter (src/backends/amd/isa). Of the runtime's functions it has
// those that dsv4 calls. FAKE_HIP_DEVICES lists the chips ("gfx942,gfx950"), FAKE_HIP_BYTES is the
// memory of each.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backends/amd/isa/machine.h"
#include "core/fail.h"

namespace {

using dsv4::amd::isa::CodeObject;
using dsv4::amd::isa::KernelInfo;
using dsv4::amd::isa::Machine;

enum HipCode {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kNoBinary = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
  kLaunchFailure = 719,
  kCaptureInvalidated = 901,
};

struct Allocation {
  int device;
  size_t bytes;
};
struct Module {
  int device;
  std::unique_ptr<Machine> machine;
  std::map<std::string, struct Function*> functions;
};
struct Function {
  Module* module;
  const KernelInfo* kernel;
};
using Work = std::vector<std::function<int()>>;
struct StreamState {
  int device;
  std::unique_ptr<Work> capture;  // while it records
};

struct State {
  std::mutex mutex;
  std::vector<std::string> devices;
  size_t device_bytes = size_t{1} << 30;
  std::map<void*, Allocation> memory;
  std::string last_fault;
};

State& state() {
  static auto& all = *[] {
    auto* out = new State;
    const char* names = std::getenv("FAKE_HIP_DEVICES");
    for (std::string rest = names == nullptr ? "" : names; !rest.empty();) {
      const size_t comma = std::min(rest.find(','), rest.size());
      out->devices.push_back(rest.substr(0, comma));
      rest.erase(0, std::min(comma + 1, rest.size()));
    }
    if (const char* bytes = std::getenv("FAKE_HIP_BYTES"))
      out->device_bytes = std::strtoull(bytes, nullptr, 10);
    return out;
  }();
  return all;
}

thread_local int t_device = 0;
thread_local int t_last_error = kSuccess;

int done(int code) {
  if (code != kSuccess) t_last_error = code;
  return code;
}
// Nothing that is thrown crosses the library's boundary.
template <typename F>
int guarded(F f, int when_thrown) {
  try {
    return done(f());
  } catch (const std::exception& error) {
    const std::lock_guard lock(state().mutex);
    state().last_fault = error.what();
    return done(when_thrown);
  }
}

size_t used_bytes(int device) {
  size_t out = 0;
  for (const auto& [data, allocation] : state().memory)
    out += allocation.device == device ? allocation.bytes : 0;
  return out;
}

// An ELF file ends with its section headers.
size_t elf_bytes(const unsigned char* image) {
  uint64_t sections;
  uint16_t entry_bytes, count;
  std::memcpy(&sections, image + 0x28, sizeof sections);
  std::memcpy(&entry_bytes, image + 0x3a, sizeof entry_bytes);
  std::memcpy(&count, image + 0x3c, sizeof count);
  return sections + size_t{entry_bytes} * count;
}

int enqueue(void* stream, std::function<int()> work) {
  auto* of = static_cast<StreamState*>(stream);
  if (of == nullptr || of->device != t_device) return kInvalidHandle;
  if (of->capture != nullptr) {
    of->capture->push_back(std::move(work));
    return kSuccess;
  }
  return work();
}

int execute(const Function& function, uint32_t blocks, uint32_t threads,
            const std::vector<std::byte>& arguments) {
  Machine& machine = *function.module->machine;
  const std::lock_guard lock(state().mutex);
  machine.clear_buffers();
  for (const auto& [data, allocation] : state().memory) {
    if (allocation.device == function.module->device)
      machine.add_buffer(data, allocation.bytes, "device memory");
  }
  machine.run(function.kernel->name, {blocks}, {threads}, std::span<const std::byte>(arguments));
  return kSuccess;
}

}  // namespace

#define FAKE_HIP extern "C" __attribute__((visibility("default")))

FAKE_HIP int hipInit(unsigned) {
  return state().devices.empty() ? done(kNoDevice) : kSuccess;
}
FAKE_HIP const char* hipGetErrorString(int code) {
  static thread_local std::string text;
  switch (code) {
    case kSuccess:
      return "no error";
    case kOutOfMemory:
      return "out of memory";
    case kNoDevice:
      return "no ROCm-capable device is detected";
    case kNotFound:
      return "named symbol not found";
    case kLaunchFailure: {
      const std::lock_guard lock(state().mutex);
      return (text = "unspecified launch failure: " + state().last_fault).c_str();
    }
    default:
      return "another error";
  }
}
FAKE_HIP int hipGetLastError() {
  return std::exchange(t_last_error, static_cast<int>(kSuccess));
}
FAKE_HIP int hipGetDeviceCount(int* count) {
  *count = static_cast<int>(state().devices.size());
  return *count == 0 ? done(kNoDevice) : kSuccess;
}
FAKE_HIP int hipGetDevicePropertiesR0600(char* properties, int device) {
  if (device < 0 || device >= static_cast<int>(state().devices.size())) return done(kInvalidDevice);
  const std::string& chip = state().devices[static_cast<size_t>(device)];
  std::memset(properties, 0, 1472);
  std::strcpy(properties, "AMD Instinct (fake gfx)");  // the name comes first, and may say "gfx"
  std::strcpy(properties + 1160, (chip + ":sramecc+:xnack-").c_str());
  return kSuccess;
}
FAKE_HIP int hipGetDevice(int* device) {
  *device = t_device;
  return kSuccess;
}
FAKE_HIP int hipSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(state().devices.size())) return done(kInvalidDevice);
  t_device = device;
  return kSuccess;
}
FAKE_HIP int hipMalloc(void** data, size_t bytes) {
  const std::lock_guard lock(state().mutex);
  if (used_bytes(t_device) + bytes > state().device_bytes) return done(kOutOfMemory);
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*data, 0xff, bytes);
  state().memory[*data] = {t_device, bytes};
  return kSuccess;
}
FAKE_HIP int hipFree(void* data) {
  const std::lock_guard lock(state().mutex);
  const auto at = state().memory.find(data);
  if (at == state().memory.end() || at->second.device != t_device) return done(kInvalidValue);
  state().memory.erase(at);
  std::free(data);
  return kSuccess;
}
FAKE_HIP int hipMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  const std::lock_guard lock(state().mutex);
  *total_bytes = state().device_bytes;
  *free_bytes = state().device_bytes - used_bytes(t_device);
  return kSuccess;
}
FAKE_HIP int hipMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  if (kind < 1 || kind > 3) return done(kInvalidValue);
  return done(enqueue(stream, [=] {
    std::memcpy(to, from, bytes);
    return static_cast<int>(kSuccess);
  }));
}
FAKE_HIP int hipStreamCreateWithFlags(void** stream, unsigned) {
  *stream = new StreamState{t_device, nullptr};
  return kSuccess;
}
FAKE_HIP int hipStreamDestroy(void* stream) {
  delete static_cast<StreamState*>(stream);
  return kSuccess;
}
FAKE_HIP int hipStreamSynchronize(void* stream) {
  return static_cast<StreamState*>(stream)->capture == nullptr ? kSuccess
                                                               : done(kCaptureInvalidated);
}
FAKE_HIP int hipModuleLoadData(void** module, const void* image) {
  return guarded(
      [&]() -> int {
        const auto* bytes = static_cast<const std::byte*>(image);
        CodeObject code =
            CodeObject::from_bytes({bytes, elf_bytes(static_cast<const unsigned char*>(image))});
        // As the driver: a code object for another chip is refused.
        if (arch_name(code.arch()) != state().devices[static_cast<size_t>(t_device)])
          return kNoBinary;
        *module = new Module{t_device, std::make_unique<Machine>(std::move(code)), {}};
        return kSuccess;
      },
      kNoBinary);
}
FAKE_HIP int hipModuleGetFunction(void** function, void* module, const char* name) {
  auto* of = static_cast<Module*>(module);
  const std::lock_guard lock(state().mutex);
  for (const KernelInfo& kernel : of->machine->code().kernels()) {
    if (kernel.name != name) continue;
    Function*& known = of->functions[name];
    if (known == nullptr) known = new Function{of, &kernel};
    *function = known;
    return kSuccess;
  }
  return done(kNotFound);
}
FAKE_HIP int hipModuleLaunchKernel(void* function, unsigned grid_x, unsigned grid_y,
                                   unsigned grid_z, unsigned block_x, unsigned block_y,
                                   unsigned block_z, unsigned shared_bytes, void* stream,
                                   void** params, void** extra) {
  const auto& f = *static_cast<Function*>(function);
  if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 ||
      shared_bytes != 0 || params == nullptr || extra != nullptr ||
      uint64_t{grid_x} * block_x > UINT32_MAX || f.module->device != t_device) {
    return done(kInvalidValue);
  }
  // One argument by value, as the code object's metadata have it; it is read at once.
  if (f.kernel->arguments.empty() || f.kernel->arguments[0].kind != "by_value" ||
      f.kernel->arguments[0].size != f.kernel->explicit_bytes()) {
    return done(kInvalidValue);
  }
  const auto* first = static_cast<const std::byte*>(params[0]);
  const std::vector<std::byte> arguments(first, first + f.kernel->explicit_bytes());
  return guarded(
      [&] {
        return enqueue(stream, [&f, grid_x, block_x, arguments] {
          return execute(f, grid_x, block_x, arguments);
        });
      },
      kLaunchFailure);
}
FAKE_HIP int hipStreamBeginCapture(void* stream, int) {
  static_cast<StreamState*>(stream)->capture = std::make_unique<Work>();
  return kSuccess;
}
FAKE_HIP int hipStreamEndCapture(void* stream, void** graph) {
  *graph = static_cast<StreamState*>(stream)->capture.release();
  return kSuccess;
}
FAKE_HIP int hipGraphInstantiate(void** exec, void* graph, void**, char*, size_t) {
  *exec = new Work(*static_cast<Work*>(graph));
  return kSuccess;
}
FAKE_HIP int hipGraphLaunch(void* exec, void*) {
  return guarded(
      [&] {
        for (const auto& work : *static_cast<Work*>(exec)) {
          if (const int code = work(); code != kSuccess) return code;
        }
        return static_cast<int>(kSuccess);
      },
      kLaunchFailure);
}
FAKE_HIP int hipGraphDestroy(void* graph) {
  delete static_cast<Work*>(graph);
  return kSuccess;
}
FAKE_HIP int hipGraphExecDestroy(void* exec) {
  delete static_cast<Work*>(exec);
  return kSuccess;
}
