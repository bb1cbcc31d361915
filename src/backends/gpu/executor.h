// Runs kernels on the CPU, lane by lane: every lane of a block is a fiber, one block at a time on
// one thread, several blocks on the threads of a pool. Part of the library (the emulated device
// uses it) and of the tests: what a GPU leaves undefined is an error here.
//
//   - Shared memory starts as 0xff (NaN), so a read before a write shows.
//   - Between two meetings a lane runs alone, in forward or reverse order: a missing barrier gives
//     other results in one of the two.
//   - Every lane of the block must reach a barrier, every lane of a group or wave its exchange: one
//     that returned or waits elsewhere is a named error (Error kInternal).
//   - Address and undefined-behaviour sanitizers see every access of a kernel.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dsv4 {
class ThreadPool;
}

namespace dsv4::gpu {

enum class LaneOrder : uint8_t { kForward, kReverse };

struct ExecuteOptions {
  ThreadPool* pool = nullptr;  ///< null: blocks run one after the other in the calling thread
  LaneOrder order = LaneOrder::kForward;  ///< of the lanes of a block, and of blocks
  int64_t shared_bytes = 64 * 1024;       ///< what a block may declare: 64 KiB on gfx942
};

namespace executor {

// ---- for the host
using LaneFunction = void (*)(const void* params);
/// Calls `lane(params)` for every lane of every block. @throws Error kInternal: a meeting that not
/// all lanes reached, shared memory beyond the limit; names the block, a lane and what it waits
/// for.
void run_grid(int64_t blocks, int threads, LaneFunction lane, const void* params,
              const ExecuteOptions& options);

// ---- for lanes (platform.h)
int thread_idx();
int64_t block_idx();
int64_t num_blocks();
void block_sync();
/// All lanes of the aligned run of `width` lanes (32: group, 64: wave).
void lane_sync(int width);
uint32_t shuffle_xor(int width, uint32_t value, int mask);
uint32_t shuffle(int width, uint32_t value, int lane);
/// Votes of the group of 32, lane l at bit l.
uint32_t group_ballot(bool vote);
/// The general meeting, for matrix instructions: `all` is called once when every lane has come,
/// with the lanes' inputs and outputs kExchangeBytes apart. `operation` and `argument` are the same
/// in all lanes.
constexpr int kExchangeBytes = 64;
struct Exchange {
  const char* operation;
  int argument;
  void (*all)(const std::byte* in, std::byte* out, int width);
};
void exchange(int width, const Exchange& what, const void* in, size_t in_bytes, void* out,
              size_t out_bytes);
/// The block's memory of one declaration; `place` identifies it.
void* shared_memory(const void* place, size_t bytes, size_t alignment, const char* name);

}  // namespace executor

/// Runs `Kernel` over `blocks` blocks and returns when all have ended.
template <typename Kernel>
void execute(int64_t blocks, const typename Kernel::Params& params,
             const ExecuteOptions& options = {}) {
  executor::run_grid(
      blocks, Kernel::kThreads,
      [](const void* p) { Kernel::run(*static_cast<const typename Kernel::Params*>(p)); }, &params,
      options);
}

}  // namespace dsv4::gpu
