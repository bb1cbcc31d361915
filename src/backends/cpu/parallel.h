// Chunked loops over the thread pool that a CPU stream carries.
#pragma once
#include <algorithm>

#include "core/checked_math.h"
#include "core/thread_pool.h"
#include "dsv4/device.h"

namespace dsv4::cpu {

inline int num_threads(Stream stream) {
  return stream.handle == nullptr ? 1 : static_cast<ThreadPool*>(stream.handle)->num_threads();
}

/// f(begin, end, thread_idx) over [0, count) in chunks of `chunk`. What f computes for an item must
/// not depend on the chunk it is in.
template <typename F>
void parallel_chunks(Stream stream, int64_t count, int64_t chunk, F&& f) {
  const int64_t chunks = ceil_div(count, chunk);
  auto body = [&](int64_t i) {
    f(i * chunk, std::min(count, (i + 1) * chunk), ThreadPool::thread_idx());
  };
  if (stream.handle == nullptr) {
    for (int64_t i = 0; i < chunks; ++i) body(i);
  } else {
    static_cast<ThreadPool*>(stream.handle)->run(chunks, body);
  }
}

}  // namespace dsv4::cpu
