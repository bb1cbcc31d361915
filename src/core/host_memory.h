// Memory of the host for large buffers.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace dsv4 {

/// Uninitialised memory, freed by std::free; null when there is none. From 4 MiB on it asks for
/// huge pages: hardware prefetch ends at a page's end, and rows gathered from a cache miss the TLB
/// less.
inline void* allocate_host_memory(int64_t bytes) {
  constexpr size_t kAlignment = 256, kHugePage = size_t{2} << 20;
  const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  const bool huge = size >= 2 * kHugePage;
  void* data = nullptr;
  if (posix_memalign(&data, huge ? kHugePage : kAlignment, size) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(data, size / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: may be refused
#endif
  return data;
}

}  // namespace dsv4
