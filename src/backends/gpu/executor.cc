#include "backends/gpu/executor.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "backends/gpu/fiber.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "core/thread_pool.h"

namespace dsv4::gpu::executor {
namespace {

constexpr int kGroup = 32, kWave = 64;

// Where lanes of one run of lanes exchange values. The first to come says what is done here.
struct Meeting {
  int arrived = 0;
  Exchange what{};
  alignas(64) std::byte in[kWave][kExchangeBytes];
  alignas(64) std::byte out[kWave][kExchangeBytes];
};

enum class LaneState : uint8_t { kReady, kWaiting, kReturned };

struct Lane {
  Fiber fiber;
  LaneState state = LaneState::kReturned;
  const char* waits_for = nullptr;
};

struct SharedPiece {
  const void* place;
  std::byte* data;
};

// The block that a thread works on; fibers and memory are kept from block to block.
class Block {
 public:
  void run(int64_t block, int64_t blocks, int threads, LaneFunction lane_function,
           const void* params, const ExecuteOptions& options);

  int thread_idx() const { return current_; }
  int64_t block_idx() const { return block_idx_; }
  int64_t num_blocks() const { return num_blocks_; }
  void block_sync();
  void meet(int width, const Exchange& what, const void* in, size_t in_bytes, void* out,
            size_t out_bytes);
  void* shared_memory(const void* place, size_t bytes, size_t alignment, const char* name);
  void lane_main();

 private:
  Lane& lane(int thread) { return *lanes_[static_cast<size_t>(thread)]; }
  void wait(const char* reason);
  void release(int begin, int count);
  void run_lanes(LaneOrder order);
  [[noreturn]] void stop();
  [[noreturn]] void report_stuck();

  int64_t block_idx_ = 0, num_blocks_ = 0;
  int threads_ = 0, current_ = 0, returned_ = 0, at_barrier_ = 0;
  LaneFunction lane_function_ = nullptr;
  const void* params_ = nullptr;
  std::string error_;          // of a lane; the block ends
  std::exception_ptr thrown_;  // by the kernel's host code, e.g. a check
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<Meeting> groups_, waves_;
  std::vector<std::byte> shared_;
  int64_t shared_limit_ = 0, shared_used_ = 0;
  std::vector<SharedPiece> pieces_;
};

thread_local Block* t_block = nullptr;

void Block::run(int64_t block, int64_t blocks, int threads, LaneFunction lane_function,
                const void* params, const ExecuteOptions& options) {
  block_idx_ = block;
  num_blocks_ = blocks;
  threads_ = threads;
  lane_function_ = lane_function;
  params_ = params;
  returned_ = at_barrier_ = 0;
  error_.clear();
  thrown_ = nullptr;
  while (static_cast<int>(lanes_.size()) < threads) lanes_.push_back(std::make_unique<Lane>());
  groups_.resize(static_cast<size_t>(threads / kGroup));
  waves_.resize(static_cast<size_t>(threads / kWave));
  for (Meeting& meeting : groups_) meeting.arrived = 0;
  for (Meeting& meeting : waves_) meeting.arrived = 0;
  pieces_.clear();
  shared_used_ = 0;
  shared_limit_ = options.shared_bytes;
  shared_.resize(static_cast<size_t>(shared_limit_));
  std::memset(shared_.data(), 0xff, shared_.size());
  for (int t = 0; t < threads; ++t) {
    lane(t).state = LaneState::kReady;
    lane(t).fiber.start([] { t_block->lane_main(); });
  }
  run_lanes(options.order);
}

// Groups one after the other, each until all of its lanes wait for others of the block or returned.
void Block::run_lanes(LaneOrder order) {
  const bool forward = order == LaneOrder::kForward;
  while (returned_ < threads_) {
    bool progress = false;
    for (int i = 0; i < threads_;) {
      const int begin = forward ? i : threads_ - kGroup - i;
      bool group_progress = false;
      for (int l = 0; l < kGroup; ++l) {
        const int thread = begin + (forward ? l : kGroup - 1 - l);
        if (lane(thread).state != LaneState::kReady) continue;
        group_progress = true;
        current_ = thread;
        lane(thread).fiber.enter();
        if (thrown_) std::rethrow_exception(thrown_);
        if (!error_.empty()) {
          fail(ErrorCode::kInternal, "executor: block ", block_idx_, ", lane ", current_, ": ",
               error_);
        }
      }
      progress = progress || group_progress;
      if (!group_progress) i += kGroup;
    }
    if (!progress && returned_ < threads_) report_stuck();
  }
}

void Block::lane_main() {
  try {
    lane_function_(params_);
  } catch (...) {
    thrown_ = std::current_exception();
  }
  ++returned_;
  lane(current_).state = LaneState::kReturned;
}

// On a lane, after error_ was set: the block ends, the lane is not entered again. Nothing that owns
// memory may live on its stack.
void Block::stop() {
  lane(current_).fiber.leave(true);
  std::terminate();
}

void Block::report_stuck() {
  int waiting = 0;
  while (lane(waiting).state != LaneState::kWaiting) ++waiting;
  int other = -1;  // one that does not wait for the same
  for (int t = 0; t < threads_ && other < 0; ++t) {
    if (lane(t).state == LaneState::kReturned ||
        std::strcmp(lane(t).waits_for, lane(waiting).waits_for) != 0) {
      other = t;
    }
  }
  std::string elsewhere = "not all of its lanes came";
  if (other >= 0 && lane(other).state == LaneState::kReturned) {
    elsewhere = concat("lane ", other, " has returned");
  } else if (other >= 0) {
    elsewhere = concat("lane ", other, " waits at ", lane(other).waits_for);
  }
  fail(ErrorCode::kInternal, "executor: block ", block_idx_,
       ": divergent barrier or lane operation: lane ", waiting, " waits at ",
       lane(waiting).waits_for, ", ", elsewhere);
}

void Block::wait(const char* reason) {
  Lane& self = lane(current_);
  self.state = LaneState::kWaiting;
  self.waits_for = reason;
  self.fiber.leave();
}

void Block::release(int begin, int count) {
  for (int t = begin; t < begin + count; ++t) lane(t).state = LaneState::kReady;
}

void Block::block_sync() {
  if (++at_barrier_ == threads_) {
    at_barrier_ = 0;
    release(0, threads_);
    return;
  }
  wait("block_sync");
}

void Block::meet(int width, const Exchange& what, const void* in, size_t in_bytes, void* out,
                 size_t out_bytes) {
  DSV4_CHECK((width == kGroup || width == kWave) && in_bytes <= kExchangeBytes &&
             out_bytes <= kExchangeBytes);
  const int self = current_, begin = self / width * width;
  Meeting& meeting = width == kGroup ? groups_[static_cast<size_t>(self / width)]
                                     : waves_[static_cast<size_t>(self / width)];
  if (meeting.arrived == 0) {
    meeting.what = what;
  } else if (std::strcmp(meeting.what.operation, what.operation) != 0 ||
             meeting.what.argument != what.argument) {
    error_ = concat("divergent lane operation: ", what.operation, " of ", what.argument,
                    ", other lanes of its group are at ", meeting.what.operation, " of ",
                    meeting.what.argument);
    stop();
  }
  const auto slot = static_cast<size_t>(self - begin);
  if (in_bytes > 0) std::memcpy(meeting.in[slot], in, in_bytes);
  if (++meeting.arrived == width) {
    meeting.arrived = 0;
    if (what.all != nullptr) what.all(meeting.in[0], meeting.out[0], width);
    release(begin, width);
  } else {
    wait(what.operation);
  }
  if (out_bytes > 0) std::memcpy(out, meeting.out[slot], out_bytes);
}

void* Block::shared_memory(const void* place, size_t bytes, size_t alignment, const char* name) {
  for (const SharedPiece& piece : pieces_) {
    if (piece.place == place) return piece.data;
  }
  const auto base = reinterpret_cast<uintptr_t>(shared_.data());
  const auto address =
      static_cast<uintptr_t>(round_up(static_cast<int64_t>(base) + shared_used_,
                                      static_cast<int64_t>(std::max<size_t>(alignment, 16))));
  const auto end = static_cast<int64_t>(address - base + bytes);
  if (end > shared_limit_) {
    error_ = concat("shared memory \"", name, "\" of ", bytes, " bytes: the block would use ", end,
                    " bytes, the limit is ", shared_limit_);
    stop();
  }
  shared_used_ = end;
  auto* data = reinterpret_cast<std::byte*>(address);
  pieces_.push_back({place, data});
  return data;
}

struct ShuffleInput {
  uint32_t value;
  int source;
};
void shuffle_all(const std::byte* in, std::byte* out, int width) {
  for (int l = 0; l < width; ++l) {
    ShuffleInput lane;
    std::memcpy(&lane, in + l * kExchangeBytes, sizeof(lane));
    std::memcpy(out + l * kExchangeBytes, in + lane.source * kExchangeBytes, sizeof(uint32_t));
  }
}

void ballot_all(const std::byte* in, std::byte* out, int width) {
  uint32_t votes = 0;
  for (int l = 0; l < width; ++l)
    votes |= static_cast<uint32_t>(in[l * kExchangeBytes] != std::byte{0}) << l;
  for (int l = 0; l < width; ++l) std::memcpy(out + l * kExchangeBytes, &votes, sizeof(votes));
}

}  // namespace

void run_grid(int64_t blocks, int threads, LaneFunction lane, const void* params,
              const ExecuteOptions& options) {
  DSV4_CHECK(threads > 0 && threads % kWave == 0 && threads <= 1024);
  if (blocks == 0) return;
  const auto run_block = [&](int64_t i) {
    static thread_local Block block;
    // A kernel that is run from within a kernel would need a second one.
    DSV4_CHECK(t_block == nullptr);
    t_block = &block;
    struct Leave {
      ~Leave() { t_block = nullptr; }
    } leave;
    const int64_t idx = options.order == LaneOrder::kForward ? i : blocks - 1 - i;
    block.run(idx, blocks, threads, lane, params, options);
  };
  if (options.pool == nullptr) {
    for (int64_t i = 0; i < blocks; ++i) run_block(i);
    return;
  }
  const int64_t per_chunk = ceil_div(blocks, ThreadPool::kMaxChunks);
  options.pool->run(ceil_div(blocks, per_chunk), [&](int64_t chunk) {
    const int64_t end = std::min(blocks, (chunk + 1) * per_chunk);
    for (int64_t i = chunk * per_chunk; i < end; ++i) run_block(i);
  });
}

int thread_idx() {
  return t_block->thread_idx();
}
int64_t block_idx() {
  return t_block->block_idx();
}
int64_t num_blocks() {
  return t_block->num_blocks();
}
void block_sync() {
  t_block->block_sync();
}
void lane_sync(int width) {
  t_block->meet(width, {"lane_sync", 0, nullptr}, nullptr, 0, nullptr, 0);
}
uint32_t shuffle_xor(int width, uint32_t value, int mask) {
  const ShuffleInput in{value, (thread_idx() % width) ^ mask};
  uint32_t out = 0;
  t_block->meet(width, {"shuffle_xor", mask, shuffle_all}, &in, sizeof(in), &out, sizeof(out));
  return out;
}
uint32_t shuffle(int width, uint32_t value, int lane) {
  const ShuffleInput in{value, lane % width};
  uint32_t out = 0;
  t_block->meet(width, {"shuffle", 0, shuffle_all}, &in, sizeof(in), &out, sizeof(out));
  return out;
}
uint32_t group_ballot(bool vote) {
  const auto in = static_cast<uint8_t>(vote);
  uint32_t out = 0;
  t_block->meet(kGroup, {"ballot", 0, ballot_all}, &in, sizeof(in), &out, sizeof(out));
  return out;
}
void exchange(int width, const Exchange& what, const void* in, size_t in_bytes, void* out,
              size_t out_bytes) {
  t_block->meet(width, what, in, in_bytes, out, out_bytes);
}
void* shared_memory(const void* place, size_t bytes, size_t alignment, const char* name) {
  return t_block->shared_memory(place, bytes, alignment, name);
}

}  // namespace dsv4::gpu::executor
