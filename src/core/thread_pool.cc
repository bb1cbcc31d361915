#include "core/thread_pool.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#include "core/fail.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsv4 {
namespace {

thread_local int current_thread_idx = 0;
thread_local bool inside_chunk = false;

// About a millisecond of PAUSE on current x86 cores: longer than the gaps between the regions of a
// step, shorter than anybody would notice as a busy core after it.
constexpr int kSpins = 20000;

void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr uint64_t kFieldBits = 24;
constexpr uint64_t kFieldMask = (1u << kFieldBits) - 1;

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  DSV4_CHECK(num_threads >= 1);
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  wake();
  for (std::thread& worker : workers_) worker.join();
}

int ThreadPool::thread_idx() {
  return current_thread_idx;
}

void ThreadPool::execute(int64_t chunk) {
  try {
    function_(context_, chunk);
  } catch (...) {
    std::lock_guard lock(error_mutex_);
    if (!first_error_) first_error_ = std::current_exception();
  }
}

void ThreadPool::run_erased(int64_t chunks, Function function, void* context) {
  DSV4_CHECK(chunks >= 0 && chunks <= kMaxChunks);
  if (workers_.empty() || chunks <= 1 || inside_chunk) {
    for (int64_t i = 0; i < chunks; ++i) function(context, i);
    return;
  }
  function_ = function;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  ++epoch_;
  ticket_.store(uint64_t{epoch_ & 0xffffu} << 48 | static_cast<uint64_t>(chunks) << kFieldBits,
                std::memory_order_release);
  wake();
  inside_chunk = true;
  drain();
  inside_chunk = false;
  while (done_.load(std::memory_order_acquire) != chunks) cpu_relax();
  if (first_error_) {
    std::exception_ptr error = std::exchange(first_error_, nullptr);
    std::rethrow_exception(error);
  }
}

void ThreadPool::drain() {
  while (true) {
    uint64_t ticket = ticket_.load(std::memory_order_relaxed);
    if ((ticket & kFieldMask) >= (ticket >> kFieldBits & kFieldMask)) return;
    ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t chunk = ticket & kFieldMask;
    if (chunk >= (ticket >> kFieldBits & kFieldMask)) return;
    execute(static_cast<int64_t>(chunk));
    done_.fetch_add(1, std::memory_order_release);
  }
}

void ThreadPool::wake() {
  bell_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) {
    syscall(SYS_futex, &bell_, FUTEX_WAKE_PRIVATE, 1 << 20, nullptr, nullptr, 0);
  }
}

void ThreadPool::work(int thread_idx) {
  current_thread_idx = thread_idx;
  inside_chunk = true;
  uint32_t seen = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    for (int spins = 0; bell_.load(std::memory_order_acquire) == seen;) {
      if (++spins < kSpins) {
        cpu_relax();
        continue;
      }
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      syscall(SYS_futex, &bell_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
      sleepers_.fetch_sub(1);
      spins = 0;
    }
    seen = bell_.load(std::memory_order_acquire);
    drain();
  }
}

}  // namespace dsv4
