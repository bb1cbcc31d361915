// When every kernel of a program on an NVIDIA GPU began and ended, those inside CUDA graphs too: a
// library that the CUDA runtime loads into the program. tools/kernel_times.py shows what it writes.
//
//   g++ -std=c++20 -shared -fPIC -I/usr/local/cuda/include tools/cuda_kernel_times.cc
//       -o libcuda_kernel_times.so -L/usr/local/cuda/lib64 -lcupti
//   CUDA_INJECTION64_PATH=$PWD/libcuda_kernel_times.so KERNEL_TIMES=FILE PROGRAM ...
//
// A line a kernel, by its beginning: begin and end in nanoseconds, stream, blocks, threads, name.
// The records make a layer of one token 5% slower, and kernels that start before others have ended
// still do.
#include <cupti.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr size_t kBufferBytes = size_t{4} << 20;

struct Kernel {
  uint64_t begin, end;
  uint32_t stream;
  int64_t blocks;
  int32_t threads;
  std::string name;
};
std::vector<Kernel> kernels;

std::string readable(const char* name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
  return text == nullptr ? name : text.get();
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* bytes, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *bytes = kBufferBytes;
  *most_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid_bytes) {
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto& kernel = *reinterpret_cast<const CUpti_ActivityKernel9*>(record);
    kernels.push_back({kernel.start, kernel.end, kernel.streamId,
                       int64_t{kernel.gridX} * kernel.gridY * kernel.gridZ, kernel.blockX,
                       readable(kernel.name)});
  }
  std::free(buffer);
}

void write_times() {
  cuptiActivityFlushAll(1);
  std::sort(kernels.begin(), kernels.end(),
            [](const Kernel& a, const Kernel& b) { return a.begin < b.begin; });
  const char* path = std::getenv("KERNEL_TIMES");
  std::FILE* file = path == nullptr ? stderr : std::fopen(path, "w");
  if (file == nullptr) {
    std::fprintf(stderr, "KERNEL_TIMES=%s cannot be written\n", path);
    return;
  }
  for (const Kernel& kernel : kernels) {
    std::fprintf(file, "%llu %llu %u %lld %d %s\n", static_cast<unsigned long long>(kernel.begin),
                 static_cast<unsigned long long>(kernel.end), kernel.stream,
                 static_cast<long long>(kernel.blocks), kernel.threads, kernel.name.c_str());
  }
  if (file != stderr) std::fclose(file);
}

}  // namespace

/// By the CUDA runtime, when it starts.
extern "C" int InitializeInjection() {
  cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  std::atexit(write_times);
  return 1;
}
