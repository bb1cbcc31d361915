// Fork-join thread pool: workers spin for about a millisecond, then sleep on a futex. Work is a
// count of chunks taken one by one, so a thread that the OS has set aside delays nobody. What a
// chunk computes must not depend on who computes it; then results do not depend on the number of
// threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace dsv4 {

/// Thread-compatible: one run() at a time per pool. run() from inside a chunk executes serially.
class ThreadPool {
 public:
  static constexpr int64_t kMaxChunks = (1 << 24) - 256;

  /// `num_threads` >= 1 counts the calling thread.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls f(chunk_idx) for every chunk in [0, chunks) and returns when all are done; rethrows the
  /// first exception.
  template <typename F>
  void run(int64_t chunks, F&& f) {
    run_erased(
        chunks,
        [](void* context, int64_t chunk) {
          (*static_cast<std::remove_reference_t<F>*>(context))(chunk);
        },
        const_cast<void*>(static_cast<const void*>(std::addressof(f))));
  }
  /// As run(), but f(chunk_idx, thread_idx) with thread_idx in [0, num_threads): for scratch that
  /// belongs to a thread.
  template <typename F>
  void run_with_thread(int64_t chunks, F&& f) {
    run(chunks, [&](int64_t chunk) { f(chunk, thread_idx()); });
  }
  /// Index of the current thread within the pool that runs it: 0 for the caller.
  static int thread_idx();

 private:
  using Function = void (*)(void*, int64_t);
  void run_erased(int64_t chunks, Function function, void* context);
  void drain();
  void wake();
  void work(int thread_idx);
  void execute(int64_t chunk);

  Function function_ = nullptr;
  void* context_ = nullptr;
  uint32_t epoch_ = 0;
  std::exception_ptr first_error_;
  std::mutex error_mutex_;
  alignas(64) std::atomic<uint64_t> ticket_{
      0};  // epoch | count | next, one word: a late worker takes no stale chunk
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace dsv4
