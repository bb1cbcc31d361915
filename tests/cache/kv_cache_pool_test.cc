// The pool: sizes, block tables, sharing and refusal, on small geometries with exact expectations.
// Random sequences of operations are in kv_cache_pool_random_test.cc.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "cache/block_allocator.h"
#include "cache/kv_format.h"
#include "core/fail.h"
#include "dsv4/cache.h"
#include "dsv4/error.h"
#include "tests/testing/host_device.h"

namespace dsv4 {
namespace {

using testing::HostDevice;

constexpr CacheSpec kWindow{CacheRole::kWindow, KvFormat::kFp8DsMla, 1, 128, 512};

std::vector<CacheSpec> sliding_layer() {
  return {kWindow};
}
std::vector<CacheSpec> csa_layer() {
  return {kWindow,
          {CacheRole::kCompressed, KvFormat::kFp8DsMla, 4, 0, 512},
          {CacheRole::kState, KvFormat::kStateF32, 1, 8, 2048},
          {CacheRole::kIndex, KvFormat::kIndexFp8, 4, 0, 128},
          {CacheRole::kIndexState, KvFormat::kStateF32, 1, 8, 512}};
}
std::vector<CacheSpec> hca_layer() {
  return {kWindow,
          {CacheRole::kCompressed, KvFormat::kFp8DsMla, 128, 0, 512},
          {CacheRole::kState, KvFormat::kStateF32, 1, 128, 1024}};
}
// 43 layers of V4-Flash: two sliding, then CSA and HCA in turn.
std::vector<std::vector<CacheSpec>> flash_specs() {
  std::vector<std::vector<CacheSpec>> out{sliding_layer(), sliding_layer()};
  for (int i = 0; i < 41; ++i) out.push_back(i % 2 == 0 ? csa_layer() : hca_layer());
  return out;
}
// Small rows and a window of 5 tokens, for tests that look at single blocks.
std::vector<std::vector<CacheSpec>> small_specs() {
  const CacheSpec window{CacheRole::kWindow, KvFormat::kF32, 1, 5, 4};
  return {{window},
          {window,
           {CacheRole::kCompressed, KvFormat::kBf16, 2, 0, 4},
           {CacheRole::kState, KvFormat::kStateF32, 1, 4, 8}}};
}
PoolLimits small_limits() {
  return {.total_tokens = 64,
          .max_seqs = 3,
          .max_step_tokens = 8,
          .window_block_tokens = 4,
          .growing_block_tokens = 8,
          .max_snapshots = 1,
          .shuffle_seed = 0};
}

std::string error_of(auto&& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(error_code_name(error.code())) + ": " + error.what();
  }
  return "no error";
}

std::vector<int32_t> blocks_of(std::span<const int32_t> span) {
  return {span.begin(), span.end()};
}

TEST(BlockAllocator, LowestFreeFirstAndCountsReferences) {
  BlockAllocator blocks(4, 0);
  EXPECT_EQ(blocks.take(), 0);
  EXPECT_EQ(blocks.take(), 1);
  EXPECT_EQ(blocks.take(), 2);
  blocks.retain(1);
  blocks.release(1);
  EXPECT_EQ(blocks.num_free(), 1);
  blocks.release(1);
  blocks.release(0);
  EXPECT_EQ(blocks.num_free(), 3);
  EXPECT_EQ(blocks.take(), 0);
  EXPECT_EQ(blocks.take(), 1);
  EXPECT_EQ(blocks.take(), 3);
  EXPECT_THROW(blocks.take(), Error);
  blocks.release(3);
  EXPECT_THROW(blocks.release(3), Error);
  EXPECT_THROW(blocks.retain(3), Error);
}

TEST(BlockAllocator, SeedGivesAnotherFixedOrder) {
  const auto order = [](uint64_t seed) {
    BlockAllocator blocks(100, seed);
    std::vector<int32_t> out;
    for (int i = 0; i < 100; ++i) out.push_back(blocks.take());
    return out;
  };
  std::vector<int32_t> ascending(100);
  std::iota(ascending.begin(), ascending.end(), 0);
  EXPECT_EQ(order(0), ascending);
  EXPECT_NE(order(1), ascending);
  EXPECT_EQ(order(1), order(1));
  EXPECT_NE(order(1), order(2));
  std::vector<int32_t> sorted = order(7);
  std::sort(sorted.begin(), sorted.end());
  EXPECT_EQ(sorted, ascending);
}

// spec/cache_layouts.md 9: 21 * 179 + 20 * 4.56 = 3850 bytes per token; pages are aligned to 64
// here, which may add at most 48 bytes to the two-row pages of HCA.
TEST(KvCachePool, FlashGeometry) {
  const PoolLimits limits{.total_tokens = 1 << 20, .max_seqs = 1, .max_step_tokens = 512};
  const PoolUsage usage = KvCachePool::plan(flash_specs(), limits);
  EXPECT_NEAR(usage.growing_bytes_per_token, 3850, 38.5);
  EXPECT_EQ(usage.growing_block_bytes, 21 * (37376 + 8448) + 20 * 1216);
  EXPECT_EQ(usage.growing_blocks, 4096);
  EXPECT_EQ(usage.window_block_bytes, 43 * 37376);
  EXPECT_EQ(usage.state_slot_bytes, 4 * (21 * 8 * (2048 + 512) + 20 * 128 * 1024));
  // 127 rows before the step and 512 of it touch at most 11 blocks of 64.
  EXPECT_EQ(usage.window_blocks, 11);
  EXPECT_EQ(usage.bytes, usage.growing_blocks * usage.growing_block_bytes +
                             usage.window_blocks * usage.window_block_bytes +
                             usage.state_slots * usage.state_slot_bytes);
}

TEST(KvCachePool, PlanIsWhatIsAllocated) {
  HostDevice device;
  {
    KvCachePool pool(small_specs(), small_limits(), device);
    const PoolUsage planned = KvCachePool::plan(small_specs(), small_limits());
    EXPECT_EQ(device.allocated_bytes(), planned.bytes);
    EXPECT_EQ(pool.usage().bytes, planned.bytes);
    EXPECT_EQ(pool.usage().growing_blocks_free, planned.growing_blocks);
    EXPECT_EQ(pool.limits().total_tokens, 64);
  }
  EXPECT_EQ(device.allocated_bytes(), 0);
  HostDevice tiny(100);
  EXPECT_NE(
      error_of([&] { KvCachePool(small_specs(), small_limits(), tiny); }).find("out of memory"),
      std::string::npos);
  EXPECT_EQ(tiny.allocated_bytes(), 0);
}

// Views of all layers: distinct memory inside the allocation, aligned, and as declared.
TEST(KvCachePool, ViewsDoNotOverlap) {
  HostDevice device;
  const auto specs = flash_specs();
  for (const int window_block : {61, 64, 69, 2}) {
    const PoolLimits limits{.total_tokens = 512,
                            .max_seqs = 2,
                            .max_step_tokens = 8,
                            .window_block_tokens = window_block,
                            .growing_block_tokens = 384};
    KvCachePool pool(specs, limits, device);
    const PoolUsage usage = pool.usage();
    std::vector<std::pair<uintptr_t, int64_t>> ranges;  // begin, bytes, of every page and ring
    for (int layer = 0; layer < 43; ++layer) {
      const LayerCaches caches = pool.caches(layer);
      EXPECT_EQ(bool(caches.compressed), layer >= 2);
      EXPECT_EQ(bool(caches.index), layer >= 2 && layer % 2 == 0);
      EXPECT_EQ(bool(caches.state), layer >= 2);
      EXPECT_EQ(bool(caches.index_state), layer >= 2 && layer % 2 == 0);
      EXPECT_EQ(caches.window.rows_per_block, window_block);
      for (const CacheView& view : {caches.window, caches.compressed, caches.index}) {
        if (!view) continue;
        EXPECT_EQ(view.block_stride_bytes % 64, 0);
        for (int64_t block = 0; block < view.num_blocks; ++block) {
          const auto begin = reinterpret_cast<uintptr_t>(block_pointer(view, block));
          EXPECT_EQ(begin % 64, 0u);
          ranges.emplace_back(begin, page_bytes(view.format, view.rows_per_block, view.row_elems));
        }
      }
      for (const StateView& view : {caches.state, caches.index_state}) {
        for (int64_t slot = 0; slot < view.num_slots; ++slot) {
          const auto begin = reinterpret_cast<uintptr_t>(view.base + slot * view.slot_stride_elems);
          EXPECT_EQ(begin % 64, 0u);
          ranges.emplace_back(begin, int64_t{4} * view.ring_rows * view.row_elems);
        }
      }
      if (layer >= 2) {
        EXPECT_EQ(caches.compressed.rows_per_block, layer % 2 == 0 ? 96 : 3);
        EXPECT_EQ(caches.state.ring_rows, layer % 2 == 0 ? 8 : 128);
        EXPECT_EQ(caches.state.row_elems, layer % 2 == 0 ? 2048 : 1024);
      }
    }
    std::sort(ranges.begin(), ranges.end());
    int64_t bytes = 0;
    for (size_t i = 0; i < ranges.size(); ++i) {
      bytes += ranges[i].second;
      if (i + 1 < ranges.size()) {
        ASSERT_LE(ranges[i].first + static_cast<uintptr_t>(ranges[i].second), ranges[i + 1].first);
      }
    }
    EXPECT_LE(bytes, usage.bytes);
    EXPECT_GE(bytes, usage.bytes - 64 * static_cast<int64_t>(ranges.size()));
  }
}

TEST(KvCachePool, TablesGrowAndWindowsSlide) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  const SequenceId a = pool.create().value();
  EXPECT_EQ(pool.length(a), 0);
  EXPECT_TRUE(pool.growing_blocks(a).empty());
  ASSERT_TRUE(pool.reserve(a, 3));
  EXPECT_EQ(blocks_of(pool.growing_blocks(a)), (std::vector<int32_t>{0}));
  EXPECT_EQ(blocks_of(pool.window_blocks(a).blocks), (std::vector<int32_t>{0}));
  pool.advance(a, 3);
  ASSERT_TRUE(pool.reserve(a, 6));  // 9 tokens: two growing blocks, three window blocks
  EXPECT_EQ(blocks_of(pool.growing_blocks(a)), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(blocks_of(pool.window_blocks(a).blocks), (std::vector<int32_t>{0, 1, 2}));
  pool.advance(a, 5);  // length 8: the next token sees 4..8, block 0 is past
  ASSERT_TRUE(pool.reserve(a, 1));
  EXPECT_EQ(pool.window_blocks(a).first_token, 4);
  EXPECT_EQ(blocks_of(pool.window_blocks(a).blocks), (std::vector<int32_t>{1, 2}));
  pool.advance(a, 1);
  // Length 9: the next token sees 5..9; block 1 holds 4..7 and stays. The freed block 0 comes back.
  ASSERT_TRUE(pool.reserve(a, 4));
  EXPECT_EQ(pool.window_blocks(a).first_token, 4);
  EXPECT_EQ(blocks_of(pool.window_blocks(a).blocks), (std::vector<int32_t>{1, 2, 0}));
  pool.advance(a, 4);
  pool.release(a);
  EXPECT_EQ(pool.usage().growing_blocks_free, pool.usage().growing_blocks);
  EXPECT_EQ(pool.usage().window_blocks_free, pool.usage().window_blocks);
  EXPECT_EQ(pool.usage().state_slots_free, pool.usage().state_slots);
}

TEST(KvCachePool, ReservationIsExactAndAllOrNothing) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  const SequenceId a = pool.create().value();
  EXPECT_TRUE(pool.reserve(a, 20));
  EXPECT_EQ(pool.growing_blocks(a).size(), 3u);
  EXPECT_EQ(pool.window_blocks(a).blocks.size(), 5u);
  EXPECT_TRUE(pool.reserve(a, 2));  // gives back what is beyond
  EXPECT_EQ(pool.growing_blocks(a).size(), 1u);
  EXPECT_EQ(pool.window_blocks(a).blocks.size(), 1u);
  EXPECT_NE(error_of([&] { pool.advance(a, 3); }).find("the 2 reserved"), std::string::npos);
  EXPECT_NE(error_of([&] { pool.advance(a, -1); }).find("invalid argument"), std::string::npos);
  pool.advance(a, 1);
  EXPECT_NE(error_of([&] { pool.advance(a, 2); }).find("the 1 reserved"), std::string::npos);

  const PoolUsage before = pool.usage();
  for (const int64_t too_many : {int64_t{1000}, int64_t{1} << 40, int64_t{1} << 61}) {
    EXPECT_FALSE(pool.reserve(a, too_many));
    EXPECT_EQ(pool.usage().growing_blocks_free, before.growing_blocks_free);
    EXPECT_EQ(pool.usage().window_blocks_free, before.window_blocks_free);
    EXPECT_EQ(pool.length(a), 1);
  }
  // Enough growing blocks, too few window blocks: nothing is taken of either.
  EXPECT_FALSE(pool.reserve(a, 60));
  EXPECT_EQ(pool.usage().growing_blocks_free, before.growing_blocks_free);
  EXPECT_NE(error_of([&] { pool.reserve(a, -1); }).find("invalid argument"), std::string::npos);
  EXPECT_NE(error_of([&] { pool.reserve(a, INT64_MAX); }).find("invalid argument"),
            std::string::npos);
}

TEST(KvCachePool, StepIsReservedWhollyOrNotAtAll) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  const SequenceId a = pool.create().value(), b = pool.create().value();
  const PoolUsage empty = pool.usage();
  const auto expect_empty = [&] {
    EXPECT_EQ(pool.usage().growing_blocks_free, empty.growing_blocks_free);
    EXPECT_EQ(pool.usage().window_blocks_free, empty.window_blocks_free);
    EXPECT_NE(error_of([&] { pool.advance(a, 1); }).find("the 0 reserved"), std::string::npos);
  };
  const std::vector<BatchEntry> too_many{{a, 4}, {b, 1000}};
  EXPECT_EQ(
      error_of([&] { pool.reserve_step(too_many); }),
      concat("out of memory: no room for 1000 tokens of sequence ", b, ": ",
             empty.growing_blocks - 1, " of ", empty.growing_blocks, " growing blocks and ",
             empty.window_blocks - 1, " of ", empty.window_blocks, " window blocks are free"));
  expect_empty();
  const std::vector<BatchEntry> unknown{{a, 4}, {b + 1, 1}};
  EXPECT_NE(error_of([&] { pool.reserve_step(unknown); }).find("is unknown"), std::string::npos);
  expect_empty();

  const std::vector<BatchEntry> step{{a, 4}, {b, 9}};
  pool.reserve_step(step);
  EXPECT_EQ(pool.growing_blocks(a).size(), 1u);
  EXPECT_EQ(pool.growing_blocks(b).size(), 2u);
  pool.advance(a, 4);
  pool.advance(b, 9);
  pool.reserve_step({});
}

TEST(KvCachePool, SequencesRunOutOfSlots) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  std::set<int32_t> slots;
  std::vector<SequenceId> ids;
  for (int i = 0; i < 4; ++i) {  // 3 sequences + 1 snapshot
    ids.push_back(pool.create().value());
    slots.insert(pool.state_slot(ids.back()));
  }
  EXPECT_EQ(slots.size(), 4u);
  EXPECT_EQ(pool.create(), std::nullopt);
  EXPECT_EQ(pool.fork(ids[0], 0), std::nullopt);
  EXPECT_FALSE(pool.snapshot(ids[0]));
  pool.release(ids[2]);
  const SequenceId again = pool.create().value();
  EXPECT_NE(again, ids[2]);  // ids are never reused
  EXPECT_NE(error_of([&] { pool.length(ids[2]); }).find("was released"), std::string::npos);
}

TEST(KvCachePool, UnknownSequences) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  for (const SequenceId id : {SequenceId{-1}, SequenceId{0}, SequenceId{77}}) {
    for (const std::string& message :
         {error_of([&] { pool.reserve(id, 1); }), error_of([&] { pool.advance(id, 0); }),
          error_of([&] { pool.release(id); }), error_of([&] { pool.fork(id, 0); }),
          error_of([&] { pool.snapshot(id); }), error_of([&] { pool.length(id); }),
          error_of([&] { pool.state_slot(id); }), error_of([&] { pool.growing_blocks(id); }),
          error_of([&] { pool.window_blocks(id); })}) {
      EXPECT_NE(message.find("invalid argument: cache pool: sequence " + std::to_string(id) +
                             " is unknown"),
                std::string::npos)
          << message;
    }
  }
  EXPECT_NE(error_of([&] { pool.caches(2); }).find("expected 0 to 1"), std::string::npos);
  EXPECT_NE(error_of([&] { pool.caches(-1); }).find("expected 0 to 1"), std::string::npos);
}

TEST(KvCachePool, ForkSharesFullBlocksAndCopiesPartialOnes) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  const SequenceId a = pool.create().value();
  ASSERT_TRUE(pool.reserve(a, 8));
  pool.advance(a, 8);
  ASSERT_TRUE(pool.reserve(a, 2));  // length 10 with window 5 sees 6..9
  pool.advance(a, 2);
  const LayerCaches caches = pool.caches(1);
  caches.state.base[pool.state_slot(a) * caches.state.slot_stride_elems] = 42.0f;
  const std::vector<int32_t> growing = blocks_of(pool.growing_blocks(a));
  const std::vector<int32_t> window = blocks_of(pool.window_blocks(a).blocks);
  ASSERT_EQ(pool.window_blocks(a).first_token, 4);
  block_pointer(caches.compressed, growing[1])[3] = std::byte{9};
  block_pointer(caches.window, window[1])[5] = std::byte{8};

  const SequenceId b = pool.fork(a, 10).value();
  EXPECT_EQ(pool.length(b), 10);
  EXPECT_EQ(blocks_of(pool.growing_blocks(a)), growing);
  EXPECT_EQ(blocks_of(pool.window_blocks(a).blocks), window);
  EXPECT_EQ(pool.growing_blocks(b)[0], growing[0]);
  EXPECT_NE(pool.growing_blocks(b)[1], growing[1]);
  EXPECT_EQ(pool.window_blocks(b).first_token, 4);
  EXPECT_EQ(pool.window_blocks(b).blocks[0], window[0]);
  EXPECT_NE(pool.window_blocks(b).blocks[1], window[1]);
  EXPECT_NE(pool.state_slot(b), pool.state_slot(a));
  EXPECT_EQ(block_pointer(caches.compressed, pool.growing_blocks(b)[1])[3], std::byte{9});
  EXPECT_EQ(block_pointer(caches.window, pool.window_blocks(b).blocks[1])[5], std::byte{8});
  EXPECT_EQ(caches.state.base[pool.state_slot(b) * caches.state.slot_stride_elems], 42.0f);

  // The shared blocks live on with either.
  pool.release(a);
  EXPECT_EQ(pool.growing_blocks(b)[0], growing[0]);
  EXPECT_EQ(pool.usage().growing_blocks_free, pool.usage().growing_blocks - 2);
  const std::string message = error_of([&] { pool.fork(b, 9); });
  EXPECT_NE(message.find("expected its length or that of a snapshot: 10"), std::string::npos)
      << message;
}

TEST(KvCachePool, SnapshotsRestoreAnOlderLength) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  const LayerCaches caches = pool.caches(1);
  const auto state = [&](SequenceId id) -> float& {
    return caches.state.base[pool.state_slot(id) * caches.state.slot_stride_elems];
  };
  const SequenceId a = pool.create().value();
  ASSERT_TRUE(pool.reserve(a, 6));
  pool.advance(a, 6);
  state(a) = 6.0f;
  ASSERT_TRUE(pool.snapshot(a));
  EXPECT_TRUE(pool.snapshot(a));  // the same point again costs nothing
  EXPECT_EQ(pool.usage().state_slots_free, 2);
  const std::vector<int32_t> window = blocks_of(pool.window_blocks(a).blocks);
  for (int i = 0; i < 3; ++i) {  // on to 18 tokens: the window of token 6 has been left behind
    ASSERT_TRUE(pool.reserve(a, 4));
    pool.advance(a, 4);
  }
  state(a) = 18.0f;
  ASSERT_TRUE(pool.reserve(a, 0));
  EXPECT_EQ(pool.window_blocks(a).first_token, 12);
  const SequenceId b = pool.fork(a, 6).value();
  EXPECT_EQ(pool.length(b), 6);
  EXPECT_EQ(state(b), 6.0f);
  EXPECT_EQ(pool.window_blocks(b).first_token, 0);
  EXPECT_EQ(pool.window_blocks(b).blocks[0], window[0]);
  EXPECT_NE(pool.window_blocks(b).blocks[1], window[1]);
  EXPECT_EQ(pool.growing_blocks(b).size(), 1u);
  const std::string message = error_of([&] { pool.fork(a, 5); });
  EXPECT_NE(message.find("snapshot: 18, 6"), std::string::npos) << message;
  pool.release(a);  // with its snapshot
  EXPECT_EQ(pool.usage().state_slots_free, 3);
  pool.release(b);
  EXPECT_EQ(pool.usage().window_blocks_free, pool.usage().window_blocks);
  EXPECT_EQ(pool.usage().growing_blocks_free, pool.usage().growing_blocks);
}

// Models without compressed layers have no growing bytes, and still count tokens.
TEST(KvCachePool, SlidingLayersOnly) {
  HostDevice device;
  const PoolLimits limits{.total_tokens = 300, .max_seqs = 1, .max_step_tokens = 150};
  KvCachePool pool({sliding_layer(), sliding_layer()}, limits, device);
  EXPECT_EQ(pool.usage().growing_block_bytes, 0);
  EXPECT_EQ(pool.usage().state_slot_bytes, 0);
  const SequenceId a = pool.create().value();
  ASSERT_TRUE(pool.reserve(a, 150));
  pool.advance(a, 150);
  ASSERT_TRUE(pool.reserve(a, 150));
  pool.advance(a, 150);
  EXPECT_EQ(pool.window_blocks(a).first_token, 0);
  EXPECT_FALSE(pool.reserve(a, 1000));
  EXPECT_EQ(pool.window_blocks(a).first_token, 128);  // length 300 sees 173..299
  EXPECT_EQ(pool.fork(a, 300), std::nullopt);         // one state slot
}

TEST(KvCachePool, RefusesLimitsAndSpecs) {
  struct Case {
    const char* expected;
    PoolLimits limits;
  };
  PoolLimits good = small_limits();
  const auto with = [&](auto&& change) {
    PoolLimits out = good;
    change(out);
    return out;
  };
  for (const Case& c : std::vector<Case>{
           {"total_tokens is 0", with([](PoolLimits& l) { l.total_tokens = 0; })},
           {"max_seqs is 0", with([](PoolLimits& l) { l.max_seqs = 0; })},
           {"max_step_tokens is -1", with([](PoolLimits& l) { l.max_step_tokens = -1; })},
           {"window_block_tokens is 0", with([](PoolLimits& l) { l.window_block_tokens = 0; })},
           {"growing_block_tokens is 0", with([](PoolLimits& l) { l.growing_block_tokens = 0; })},
           {"max_snapshots is -1", with([](PoolLimits& l) { l.max_snapshots = -1; })},
           {"growing_block_tokens is 7, expected a multiple of 2",
            with([](PoolLimits& l) { l.growing_block_tokens = 7; })},
           {"32-bit", with([](PoolLimits& l) { l.total_tokens = int64_t{1} << 40; })}}) {
    const std::string message = error_of([&] { KvCachePool::plan(small_specs(), c.limits); });
    EXPECT_NE(message.find("invalid argument: cache pool"), std::string::npos) << message;
    EXPECT_NE(message.find(c.expected), std::string::npos) << message;
  }
  const auto refused = [&](const CacheSpec& spec) {
    return error_of([&] { KvCachePool::plan({{}, {spec}}, good); });
  };
  const CacheSpec window{CacheRole::kWindow, KvFormat::kF32, 1, 5, 4};
  EXPECT_EQ(refused(window), "no error");
  const std::string twice = error_of([&] { KvCachePool::plan({{window, window}}, good); });
  EXPECT_NE(twice.find("layer 0 declares two window caches"), std::string::npos) << twice;
  for (const CacheSpec& spec : {CacheSpec{CacheRole::kWindow, KvFormat::kIndexFp8, 1, 5, 4},
                                CacheSpec{CacheRole::kIndex, KvFormat::kF32, 2, 0, 4},
                                CacheSpec{CacheRole::kState, KvFormat::kF32, 1, 4, 4},
                                CacheSpec{CacheRole::kWindow, KvFormat::kFp8DsMla, 1, 5, 64},
                                CacheSpec{CacheRole::kWindow, KvFormat::kF32, 2, 5, 4},
                                CacheSpec{CacheRole::kWindow, KvFormat::kF32, 1, 0, 4},
                                CacheSpec{CacheRole::kState, KvFormat::kStateF32, 1, 0, 4},
                                CacheSpec{CacheRole::kCompressed, KvFormat::kF32, 2, 9, 4},
                                CacheSpec{CacheRole::kCompressed, KvFormat::kF32, 0, 0, 4}}) {
    EXPECT_NE(refused(spec).find("invalid argument: cache"), std::string::npos) << refused(spec);
  }
}

#ifndef NDEBUG
TEST(KvCachePool, DebugBuildsPoisonWhatIsHandedOut) {
  HostDevice device;
  KvCachePool pool(small_specs(), small_limits(), device);
  const CacheView view = pool.caches(0).window;
  for (int round = 0; round < 2; ++round) {  // fresh memory, then recycled
    const SequenceId a = pool.create().value();
    ASSERT_TRUE(pool.reserve(a, 1));
    std::byte* block = block_pointer(view, pool.window_blocks(a).blocks[0]);
    for (int64_t i = 0; i < page_bytes(view.format, view.rows_per_block, view.row_elems); ++i) {
      ASSERT_EQ(block[i], std::byte{0xff});
    }
    block[3] = std::byte{1};
    pool.release(a);
  }
}
#endif

}  // namespace
}  // namespace dsv4
