// Input: a safetensors file. It may be refused; every byte of a tensor that is given must be
// readable.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "checkpoint/safetensors.h"
#include "dsv4/error.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const dsv4::SafetensorsFile& file, size_t file_bytes) {
  int64_t total = 0;
  unsigned sum = 0;
  for (const std::string& name : file.names()) {
    require(file.contains(name));
    try {
      const dsv4::ConstTensor tensor = file.get(name);
      require(tensor.is_contiguous() || tensor.num_elements() == 0);
      require(reinterpret_cast<uintptr_t>(tensor.data) %
                      static_cast<uintptr_t>(dsv4::size_of(tensor.dtype)) ==
                  0 ||
              tensor.num_bytes() == 0);
      total += tensor.num_bytes();
      for (int64_t i = 0; i < tensor.num_bytes(); ++i) sum += tensor.as<uint8_t>()[i];
    } catch (const dsv4::Error& error) {
      require(error.code() == dsv4::ErrorCode::kUnsupported);
    }
  }
  // Tensors do not overlap, so together they fit the file.
  require(total <= static_cast<int64_t>(file_bytes));
  volatile unsigned used = sum;  // the reads must not be optimised away
  (void)used;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int fd = ::memfd_create("fuzz", 0);
  require(fd >= 0);
  require(::write(fd, data, size) == static_cast<ssize_t>(size));
  try {
    const dsv4::SafetensorsFile file("/proc/self/fd/" + std::to_string(fd));
    check(file, size);
  } catch (const dsv4::Error& error) {
    require(error.code() == dsv4::ErrorCode::kDataCorrupt ||
            error.code() == dsv4::ErrorCode::kUnsupported);
  }
  ::close(fd);
  return 0;
}
