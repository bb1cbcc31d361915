#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace dsv4 {
namespace {

TEST(ThreadPool, EveryChunkOnce) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (int64_t chunks : {0, 1, 2, 7, 1000}) {
      for (int repeat = 0; repeat < 20; ++repeat) {
        std::vector<std::atomic<int>> hits(static_cast<size_t>(chunks));
        pool.run(chunks, [&](int64_t i) { hits[static_cast<size_t>(i)].fetch_add(1); });
        for (const auto& hit : hits) ASSERT_EQ(hit.load(), 1);
      }
    }
  }
}

TEST(ThreadPool, WritesOfChunksAreVisibleToTheCaller) {
  ThreadPool pool(3);
  std::vector<int64_t> values(5000);
  for (int repeat = 1; repeat < 50; ++repeat) {
    pool.run(static_cast<int64_t>(values.size()),
             [&](int64_t i) { values[static_cast<size_t>(i)] = i * repeat; });
    for (size_t i = 0; i < values.size(); ++i)
      ASSERT_EQ(values[i], static_cast<int64_t>(i) * repeat);
  }
}

TEST(ThreadPool, ThreadIndexIsInRange) {
  ThreadPool pool(4);
  std::atomic<int> bad{0};
  pool.run_with_thread(2000, [&](int64_t, int thread) {
    if (thread < 0 || thread >= 4) bad.fetch_add(1);
  });
  EXPECT_EQ(bad.load(), 0);
}

TEST(ThreadPool, NestedRunsAreSerial) {
  ThreadPool pool(2);
  std::atomic<int> count{0};
  pool.run(4, [&](int64_t) { pool.run(5, [&](int64_t) { count.fetch_add(1); }); });
  EXPECT_EQ(count.load(), 20);
}

TEST(ThreadPool, FirstExceptionReachesTheCallerAndThePoolLives) {
  ThreadPool pool(3);
  EXPECT_THROW(pool.run(100,
                        [](int64_t i) {
                          if (i == 57) throw std::runtime_error("chunk 57");
                        }),
               std::runtime_error);
  std::atomic<int> count{0};
  pool.run(100, [&](int64_t) { count.fetch_add(1); });
  EXPECT_EQ(count.load(), 100);
}

}  // namespace
}  // namespace dsv4
