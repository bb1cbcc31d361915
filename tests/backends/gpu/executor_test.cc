// The executor: what it runs rightly, and that it finds what a GPU would leave undefined. Each
// control has a right kernel and the same kernel with one mistake.
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "backends/gpu/platform.h"
#include "core/thread_pool.h"
#include "dsv4/error.h"

namespace dsv4::gpu {
namespace {

constexpr LaneOrder kOrders[] = {LaneOrder::kForward, LaneOrder::kReverse};

template <typename Kernel>
std::string error_of(const typename Kernel::Params& params, const ExecuteOptions& options = {}) {
  try {
    execute<Kernel>(2, params, options);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInternal);
    return error.what();
  }
  return "";
}

struct IntArgs {
  int* out;
};

// ---- what works

struct LaneNumbers {
  using Params = IntArgs;
  static constexpr int kThreads = 128;
  DSV4_DEVICE static void run(const Params& params) {
    params.out[block_idx() * kThreads + thread_idx()] =
        static_cast<int>(1000 * num_blocks()) + 100 * group_idx() + group_lane();
  }
};

TEST(Executor, LanesKnowWhereTheyAre) {
  for (int threads : {1, 3}) {
    ThreadPool pool(threads);
    for (LaneOrder order : kOrders) {
      std::vector<int> out(size_t{7} * LaneNumbers::kThreads, -1);
      execute<LaneNumbers>(7, {out.data()}, {.pool = &pool, .order = order});
      for (size_t i = 0; i < out.size(); ++i) {
        const int lane = static_cast<int>(i % 128);
        EXPECT_EQ(out[i], 7000 + lane / 32 * 100 + lane % 32);
      }
    }
  }
}

struct Exchanges {
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    const int base = 3 * kThreads * static_cast<int>(block_idx()) + 3 * thread_idx();
    params.out[base] = shuffle_xor(thread_idx(), 5);
    params.out[base + 1] = shuffle(thread_idx(), (group_lane() + 3) & 31);
    params.out[base + 2] = group_max(thread_idx() * 7 % 31);
  }
};

TEST(Executor, LanesExchangeWithinTheirGroup) {
  for (LaneOrder order : kOrders) {
    std::vector<int> out(size_t{2} * 64 * 3);
    execute<Exchanges>(2, {out.data()}, {.order = order});
    for (int t = 0; t < 64; ++t) {
      const int base = t / 32 * 32;
      int largest = 0;
      for (int l = base; l < base + 32; ++l) largest = std::max(largest, l * 7 % 31);
      for (int block : {0, 1}) {
        const int* lane = out.data() + 3 * (64 * block + t);
        EXPECT_EQ(lane[0], t ^ 5);
        EXPECT_EQ(lane[1], base + (t - base + 3) % 32);
        EXPECT_EQ(lane[2], largest);
      }
    }
  }
}

struct FloatArgs {
  const float* in;
  float* out;
};

// Groups of one wave may part: only the first exchanges.
struct HalfWave {
  using Params = FloatArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    if (group_idx() == 0) params.out[thread_idx()] = group_sum(params.in[thread_idx()]);
  }
};

TEST(Executor, HalvesOfAWaveAreIndependent) {
  std::vector<float> in(64), out(64, -1.0f);
  std::iota(in.begin(), in.end(), 1.0f);
  execute<HalfWave>(1, {in.data(), out.data()});
  for (int t = 0; t < 64; ++t) EXPECT_EQ(out[static_cast<size_t>(t)], t < 32 ? 528.0f : -1.0f);
}

struct WaveSwap {
  using Params = IntArgs;
  static constexpr int kThreads = 128;
  DSV4_DEVICE static void run(const Params& params) {
    const int in = thread_idx();
    int out = 0;
    executor::exchange(64,
                       {"swap", 0,
                        [](const std::byte* from, std::byte* to, int width) {
                          for (int l = 0; l < width; ++l) {
                            std::copy_n(from + (width - 1 - l) * executor::kExchangeBytes,
                                        sizeof(int), to + l * executor::kExchangeBytes);
                          }
                        }},
                       &in, sizeof(in), &out, sizeof(out));
    params.out[thread_idx()] = out;
  }
};

TEST(Executor, WavesOf64Exchange) {
  std::vector<int> out(128);
  execute<WaveSwap>(1, {out.data()});
  for (int t = 0; t < 128; ++t) EXPECT_EQ(out[static_cast<size_t>(t)], t / 64 * 64 + 63 - t % 64);
}

struct BlockSums {
  struct Shared {
    float partial[4];
  };
  using Params = FloatArgs;
  static constexpr int kThreads = 128;
  DSV4_DEVICE static void run(const Params& params) {
    DSV4_SHARED(Shared, shared);
    const float first = block_sum<kThreads>(params.in[thread_idx()], shared.partial);
    const float second = block_sum<kThreads>(2 * params.in[thread_idx()], shared.partial);
    params.out[thread_idx()] = first + second;
  }
};

TEST(Executor, BlockSumsHaveOneOrder) {
  std::vector<float> in(128);
  for (size_t i = 0; i < in.size(); ++i) in[i] = 1.0f / static_cast<float>(i + 1);
  float groups[4];
  for (int g = 0; g < 4; ++g) {
    float lanes[32];
    std::copy_n(in.data() + 32 * g, 32, lanes);
    for (int distance : {16, 8, 4, 2, 1}) {
      float next[32];
      for (int l = 0; l < 32; ++l) next[l] = lanes[l] + lanes[l ^ distance];
      std::copy_n(next, 32, lanes);
    }
    groups[g] = lanes[0];
  }
  const float sum = ((groups[0] + groups[1]) + groups[2]) + groups[3];
  for (LaneOrder order : kOrders) {
    std::vector<float> out(128);
    execute<BlockSums>(1, {in.data(), out.data()}, {.order = order});
    for (float value : out) EXPECT_EQ(value, sum + 2 * sum);
  }
}

struct Counts {
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    atomic_add(params.out, 1);
    atomic_max(reinterpret_cast<uint32_t*>(params.out) + 1,
               static_cast<uint32_t>(block_idx() * 64 + thread_idx()));
  }
};

TEST(Executor, AtomicsHoldOverThreads) {
  ThreadPool pool(4);
  int out[2] = {0, 0};
  execute<Counts>(50, {out}, {.pool = &pool});
  EXPECT_EQ(out[0], 50 * 64);
  EXPECT_EQ(out[1], 50 * 64 - 1);
}

// ---- controls: one mistake each

// A rotation through shared memory; without the first barrier a lane reads what its neighbour has
// not yet written, without the second it overwrites what the neighbour has not yet read.
template <bool kFirstBarrier, bool kSecondBarrier>
struct RotateTwice {
  struct Shared {
    float value[64];
  };
  using Params = FloatArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    DSV4_SHARED(Shared, shared);
    const int t = thread_idx();
    shared.value[t] = params.in[t];
    if (kFirstBarrier) block_sync();
    const float once = shared.value[(t + 1) % kThreads];
    if (kSecondBarrier) block_sync();
    shared.value[t] = 2 * once;
    block_sync();
    params.out[t] = shared.value[(t + 1) % kThreads];
  }
};

template <typename Kernel>
bool rotates_rightly(LaneOrder order) {
  std::vector<float> in(64), out(64);
  std::iota(in.begin(), in.end(), 1.0f);
  execute<Kernel>(1, {in.data(), out.data()}, {.order = order});
  for (size_t t = 0; t < 64; ++t) {
    if (out[t] != 2 * in[(t + 2) % 64]) return false;
  }
  return true;
}

TEST(Executor, FindsADroppedBarrier) {
  for (LaneOrder order : kOrders) EXPECT_TRUE((rotates_rightly<RotateTwice<true, true>>(order)));
  // A missing one shows in at least one of the two orders.
  EXPECT_FALSE((rotates_rightly<RotateTwice<false, true>>(LaneOrder::kForward) &&
                rotates_rightly<RotateTwice<false, true>>(LaneOrder::kReverse)));
  EXPECT_FALSE((rotates_rightly<RotateTwice<true, false>>(LaneOrder::kForward) &&
                rotates_rightly<RotateTwice<true, false>>(LaneOrder::kReverse)));
}

struct ReadsUnwritten {
  struct Shared {
    float value[64];
  };
  using Params = FloatArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    DSV4_SHARED(Shared, shared);
    if (thread_idx() != 17) shared.value[thread_idx()] = 1.0f;
    block_sync();
    params.out[thread_idx()] = shared.value[thread_idx()];
  }
};

TEST(Executor, SharedMemoryStartsAsNan) {
  std::vector<float> out(64);
  for (int run = 0; run < 2; ++run) {  // what a block before left there is gone
    execute<ReadsUnwritten>(1, {nullptr, out.data()});
    for (int t = 0; t < 64; ++t)
      EXPECT_EQ(out[static_cast<size_t>(t)] != out[static_cast<size_t>(t)], t == 17);
  }
}

struct ReturnsEarly {
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params&) {
    if (thread_idx() == 40) return;
    block_sync();
  }
};
struct ReturnsFromGroup {
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    if (thread_idx() == 3) return;
    params.out[0] = group_max(thread_idx());
  }
};
struct DivergentBarrier {
  using Params = IntArgs;
  static constexpr int kThreads = 128;
  DSV4_DEVICE static void run(const Params& params) {
    if (group_idx() == 1) {
      params.out[0] = group_max(1);
    }
    if (thread_idx() < 70) block_sync();
  }
};
struct DivergentShuffle {
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    params.out[0] = thread_idx() < 7 ? shuffle_xor(1, 1) : shuffle_xor(1, 2);
  }
};
struct BarrierAgainstShuffle {
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    if (thread_idx() == 9) {
      block_sync();
    } else {
      params.out[0] = shuffle(1, 0);
    }
  }
};

TEST(Executor, NamesWhereLanesPart) {
  int out = 0;
  for (LaneOrder order : kOrders) {
    const ExecuteOptions options{.order = order};
    EXPECT_NE(
        error_of<ReturnsEarly>({&out}, options).find("waits at block_sync, lane 40 has returned"),
        std::string::npos);
    EXPECT_NE(error_of<ReturnsFromGroup>({&out}, options)
                  .find("waits at shuffle_xor, lane 3 has returned"),
              std::string::npos);
    EXPECT_NE(error_of<DivergentBarrier>({&out}, options)
                  .find("waits at block_sync, lane 70 has returned"),
              std::string::npos);
    EXPECT_NE(error_of<DivergentShuffle>({&out}, options)
                  .find("divergent lane operation: shuffle_xor of"),
              std::string::npos);
    const std::string mixed = error_of<BarrierAgainstShuffle>({&out}, options);
    EXPECT_NE(mixed.find("waits at block_sync"), std::string::npos) << mixed;
    EXPECT_NE(mixed.find("waits at shuffle"), std::string::npos) << mixed;
  }
  // The executor works on after an error.
  EXPECT_TRUE((rotates_rightly<RotateTwice<true, true>>(LaneOrder::kForward)));
}

struct LargeShared {
  struct Shared {
    float value[12000];
  };
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    DSV4_SHARED(Shared, first);
    DSV4_SHARED(Shared, second);
    first.value[thread_idx()] = second.value[thread_idx()] = 1;
    params.out[0] = 1;
  }
};

TEST(Executor, RefusesSharedMemoryBeyondTheLimit) {
  int out = 0;
  const std::string error = error_of<LargeShared>({&out});
  EXPECT_NE(error.find("shared memory \"second\" of 48000 bytes"), std::string::npos) << error;
  EXPECT_NE(error.find("the limit is 65536"), std::string::npos) << error;
  EXPECT_EQ(out, 0);
  EXPECT_EQ(error_of<LargeShared>({&out}, {.shared_bytes = 160 * 1024}), "");
  EXPECT_EQ(out, 1);
}

struct Throws {
  using Params = IntArgs;
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params&) {
    if (thread_idx() == 5) throw Error(ErrorCode::kInternal, "a check of the kernel");
    block_sync();
  }
};

TEST(Executor, PassesOnWhatAKernelThrows) {
  EXPECT_EQ(error_of<Throws>({nullptr}), "a check of the kernel");
}

}  // namespace
}  // namespace dsv4::gpu
