// Random operations on the pool against a model that remembers what every sequence has written.
// Checked after every operation: contents of all rows that later tokens may read (this finds every
// fault of sharing, copying and freeing), the number of blocks in use, and that nobody else holds a
// block that a sequence will write.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "dsv4/cache.h"
#include "tests/testing/host_device.h"

namespace dsv4 {
namespace {

using testing::HostDevice;

constexpr int kRatio = 2;
constexpr int kRing = 4;
constexpr int kElems = 4;

struct Geometry {
  int keep, window_block, growing_block;
  uint64_t shuffle_seed;
};

// For the names of failed parameters.
void PrintTo(const Geometry& geometry, std::ostream* out) {
  *out << "window " << geometry.keep << ", blocks of " << geometry.window_block << " and "
       << geometry.growing_block << " tokens, seed " << geometry.shuffle_seed;
}

std::vector<std::vector<CacheSpec>> specs_of(const Geometry& geometry) {
  const CacheSpec window{CacheRole::kWindow, KvFormat::kF32, 1, geometry.keep, kElems};
  return {{window},
          {{CacheRole::kIndex, KvFormat::kIndexF32, kRatio, 0, kElems},
           {CacheRole::kState, KvFormat::kStateF32, 1, kRing, kElems},
           {CacheRole::kCompressed, KvFormat::kF32, kRatio, 0, kElems},
           window}};
}

struct ModelSnapshot {
  int64_t length;
  std::vector<int32_t> window_blocks;
};
struct ModelSequence {
  std::vector<float> tokens;  // what each token wrote
  int64_t reserved = 0;
  std::map<int64_t, ModelSnapshot> snapshots;
  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
};

class PoolModel {
 public:
  PoolModel(const Geometry& geometry, const PoolLimits& limits, uint32_t seed)
      : geometry_(geometry),
        limits_(limits),
        pool_(specs_of(geometry), limits, device_),
        rng_(seed) {}

  int64_t random(int64_t begin, int64_t end) {
    return std::uniform_int_distribution<int64_t>(begin, end)(rng_);
  }
  SequenceId pick() {
    auto it = sequences_.begin();
    std::advance(it, random(0, static_cast<int64_t>(sequences_.size()) - 1));
    return it->first;
  }
  int64_t holders() const {
    int64_t count = static_cast<int64_t>(sequences_.size());
    for (const auto& entry : sequences_) {
      count += static_cast<int64_t>(entry.second.snapshots.size());
    }
    return count;
  }
  int64_t total_tokens() const {
    int64_t total = 0;
    for (const auto& entry : sequences_) total += entry.second.length();
    return total;
  }
  int64_t max_holders() const { return limits_.max_seqs + limits_.max_snapshots; }
  bool empty() const { return sequences_.empty(); }

  void create() {
    const auto id = pool_.create();
    ASSERT_EQ(id.has_value(), holders() < max_holders());
    if (id) sequences_[*id] = {};
  }

  // `must`: within the limits, so that refusing would break the promise of PoolLimits.
  void reserve(SequenceId id, int64_t tokens, bool must) {
    ModelSequence& sequence = sequences_.at(id);
    const auto growing = pool_.growing_blocks(id).size();
    const PoolUsage before = pool_.usage();
    if (pool_.reserve(id, tokens)) {
      sequence.reserved = tokens;
      const auto window = pool_.window_blocks(id);
      ASSERT_EQ(static_cast<int64_t>(pool_.growing_blocks(id).size()),
                ceil_div(sequence.length() + tokens, geometry_.growing_block));
      ASSERT_EQ(window.first_token,
                first_visible(sequence.length()) / geometry_.window_block * geometry_.window_block);
      ASSERT_EQ(
          window.first_token / geometry_.window_block + static_cast<int64_t>(window.blocks.size()),
          ceil_div(sequence.length() + tokens, geometry_.window_block));
    } else {
      ASSERT_FALSE(must) << "refused " << tokens << " tokens after " << sequence.length();
      ASSERT_EQ(pool_.growing_blocks(id).size(), growing);
      ASSERT_EQ(pool_.usage().growing_blocks_free, before.growing_blocks_free);
      ASSERT_GE(pool_.usage().window_blocks_free, before.window_blocks_free);
    }
  }

  // A step writes all reserved tokens; `accepted` of them stay. The others are drafts that later
  // tokens overwrite (state rings take accepted tokens only).
  void step(SequenceId id, int64_t accepted) {
    ModelSequence& sequence = sequences_.at(id);
    const int64_t length = sequence.length();
    std::vector<float> written = sequence.tokens;
    for (int64_t i = 0; i < sequence.reserved; ++i) {
      written.push_back(static_cast<float>(random(1, 1 << 20)));
    }
    const LayerCaches caches[2] = {pool_.caches(0), pool_.caches(1)};
    for (int64_t p = length; p < length + sequence.reserved; ++p) {
      const float value = written[static_cast<size_t>(p)];
      for (const LayerCaches& layer : caches) write(layer.window, window_slot(id, p), value);
      if ((p + 1) % kRatio == 0) {
        for (const CacheView& view : {caches[1].compressed, caches[1].index}) {
          write(view, growing_slot(id, p / kRatio), value + written[static_cast<size_t>(p - 1)]);
        }
      }
      if (p < length + accepted) *ring_row(id, p) = value;
    }
    written.resize(static_cast<size_t>(length + accepted));
    sequence.tokens = std::move(written);
    pool_.advance(id, accepted);
    sequence.reserved -= accepted;
  }

  // Keeps all of a step, or sometimes a part, and gives back the rest of the reservation.
  void accept(SequenceId id) {
    const int64_t reserved = sequences_.at(id).reserved;
    const int64_t accepted = random(0, 3) != 0 ? reserved : random(0, reserved);
    step(id, accepted);
    if (accepted < reserved) reserve(id, 0, true);
  }
  // Keeps any part, and leaves the rest reserved.
  void accept_some(SequenceId id) { step(id, random(0, sequences_.at(id).reserved)); }

  void snapshot(SequenceId id) {
    ModelSequence& sequence = sequences_.at(id);
    const bool known = sequence.snapshots.contains(sequence.length());
    const bool room = holders() < max_holders();
    ASSERT_EQ(pool_.snapshot(id), known || room);
    if (known || !room) return;
    ModelSnapshot& out = sequence.snapshots[sequence.length()];
    out.length = sequence.length();
    const auto window = pool_.window_blocks(id);
    const int64_t first = first_visible(out.length) / geometry_.window_block;
    for (int64_t i = first; i < ceil_div(out.length, geometry_.window_block); ++i) {
      out.window_blocks.push_back(
          window.blocks[static_cast<size_t>(i - window.first_token / geometry_.window_block)]);
    }
  }

  void fork(SequenceId id, bool must) {
    const ModelSequence& source = sequences_.at(id);
    std::vector<int64_t> lengths{source.length()};
    for (const auto& entry : source.snapshots) lengths.push_back(entry.first);
    const int64_t length =
        lengths[static_cast<size_t>(random(0, static_cast<int64_t>(lengths.size()) - 1))];
    const bool room = holders() < max_holders();
    const auto child = pool_.fork(id, length);
    ASSERT_TRUE(room || !child.has_value());
    ASSERT_TRUE(child.has_value() || !(must && room));
    if (!child) return;
    ModelSequence copy;
    copy.tokens.assign(source.tokens.begin(), source.tokens.begin() + length);
    sequences_[*child] = std::move(copy);
  }

  void release(SequenceId id) {
    pool_.release(id);
    sequences_.erase(id);
  }

  void check() {
    std::map<int32_t, std::set<SequenceId>> growing_holders, window_holders;
    std::set<int32_t> slots;
    for (const auto& [id, sequence] : sequences_) {
      ASSERT_EQ(pool_.length(id), sequence.length());
      ASSERT_TRUE(slots.insert(pool_.state_slot(id)).second);
      std::set<int32_t> own;
      for (int32_t block : pool_.growing_blocks(id)) {
        ASSERT_TRUE(own.insert(block).second);
        growing_holders[block].insert(id);
      }
      own.clear();
      for (int32_t block : pool_.window_blocks(id).blocks) {
        ASSERT_TRUE(own.insert(block).second);
        window_holders[block].insert(id);
      }
      for (const auto& entry : sequence.snapshots) {
        for (int32_t block : entry.second.window_blocks) window_holders[block].insert(id);
      }
      check_contents(id, sequence);
    }
    const PoolUsage usage = pool_.usage();
    ASSERT_EQ(usage.growing_blocks - usage.growing_blocks_free,
              static_cast<int64_t>(growing_holders.size()));
    ASSERT_EQ(usage.window_blocks - usage.window_blocks_free,
              static_cast<int64_t>(window_holders.size()));
    ASSERT_EQ(usage.state_slots - usage.state_slots_free, holders());
    for (const auto& entry : sequences_) {
      const SequenceId id = entry.first;
      const int64_t length = entry.second.length();
      const auto growing = pool_.growing_blocks(id);
      for (size_t i = static_cast<size_t>(length / geometry_.growing_block); i < growing.size();
           ++i)
        ASSERT_EQ(growing_holders[growing[i]].size(), 1u);
      const auto window = pool_.window_blocks(id);
      for (size_t i = 0; i < window.blocks.size(); ++i) {
        const int64_t end =
            window.first_token + (static_cast<int64_t>(i) + 1) * geometry_.window_block;
        if (end <= length) continue;
        ASSERT_EQ(window_holders[window.blocks[i]].size(), 1u);
      }
    }
  }

  void release_all() {
    while (!sequences_.empty()) release(sequences_.begin()->first);
    check();
  }

 private:
  int64_t first_visible(int64_t length) const {
    return std::max<int64_t>(0, length - geometry_.keep + 1);
  }
  int64_t window_slot(SequenceId id, int64_t position) const {
    const auto window = pool_.window_blocks(id);
    const int64_t offset = position - window.first_token;
    return int64_t{window.blocks[static_cast<size_t>(offset / geometry_.window_block)]} *
               geometry_.window_block +
           offset % geometry_.window_block;
  }
  int64_t growing_slot(SequenceId id, int64_t entry) const {
    const int64_t rows = geometry_.growing_block / kRatio;
    return int64_t{pool_.growing_blocks(id)[static_cast<size_t>(entry / rows)]} * rows +
           entry % rows;
  }
  float* ring_row(SequenceId id, int64_t position) const {
    const StateView state = pool_.caches(1).state;
    return state.base + pool_.state_slot(id) * state.slot_stride_elems +
           position % state.ring_rows * state.row_elems;
  }
  static void write(const CacheView& view, int64_t slot, float value) {
    const float row[kElems] = {value, -value, value + 1, 0.0f};
    encode_row(view, slot, row);
  }
  static void expect(const CacheView& view, int64_t slot, float value) {
    float row[kElems];
    decode_row(view, slot, row);
    ASSERT_EQ(row[0], value);
    ASSERT_EQ(row[1], -value);
    ASSERT_EQ(row[2], value + 1);
  }
  void check_contents(SequenceId id, const ModelSequence& sequence) {
    const int64_t length = sequence.length();
    const auto token = [&](int64_t p) { return sequence.tokens[static_cast<size_t>(p)]; };
    for (int64_t p = first_visible(length); p < length; ++p) {
      for (int layer = 0; layer < 2; ++layer)
        expect(pool_.caches(layer).window, window_slot(id, p), token(p));
    }
    for (int64_t entry = 0; entry < length / kRatio; ++entry) {
      const float value = token(kRatio * entry) + token(kRatio * entry + 1);
      expect(pool_.caches(1).compressed, growing_slot(id, entry), value);
      expect(pool_.caches(1).index, growing_slot(id, entry), value);
    }
    for (int64_t p = std::max<int64_t>(0, length - kRing); p < length; ++p)
      ASSERT_EQ(*ring_row(id, p), token(p));
  }

  Geometry geometry_;
  PoolLimits limits_;
  HostDevice device_;
  KvCachePool pool_;
  std::mt19937 rng_;
  std::map<SequenceId, ModelSequence> sequences_;
};

PoolLimits limits_of(const Geometry& geometry) {
  return {.total_tokens = 150,
          .max_seqs = 4,
          .max_step_tokens = 20,
          .window_block_tokens = geometry.window_block,
          .growing_block_tokens = geometry.growing_block,
          .max_snapshots = 2,
          .shuffle_seed = geometry.shuffle_seed};
}

class KvCachePoolRandom : public ::testing::TestWithParam<Geometry> {};

// Anything goes, in and beyond the limits.
TEST_P(KvCachePoolRandom, AnyOperations) {
  for (uint32_t seed = 0; seed < 6; ++seed) {
    PoolModel model(GetParam(), limits_of(GetParam()), seed);
    for (int i = 0; i < 700; ++i) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", operation " + std::to_string(i));
      const int64_t choice = model.random(0, 99);
      if (model.empty() || choice < 8) {
        model.create();
      } else if (choice < 45) {
        model.reserve(model.pick(), model.random(0, choice < 12 ? 200 : 14), false);
      } else if (choice < 80) {
        model.accept_some(model.pick());
      } else if (choice < 86) {
        model.snapshot(model.pick());
      } else if (choice < 94) {
        model.fork(model.pick(), false);
      } else {
        model.release(model.pick());
      }
      if (HasFatalFailure()) return;
      model.check();
      if (HasFatalFailure()) return;
    }
    model.release_all();
    if (HasFatalFailure()) return;
  }
}

// Steps as an engine runs them, always within the limits: nothing may be refused.
TEST_P(KvCachePoolRandom, WithinTheLimitsNothingIsRefused) {
  const PoolLimits limits = limits_of(GetParam());
  for (uint32_t seed = 100; seed < 106; ++seed) {
    PoolModel model(GetParam(), limits, seed);
    for (int i = 0; i < 400; ++i) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", operation " + std::to_string(i));
      const int64_t choice = model.random(0, 99);
      if (model.empty() || choice < 10) {
        if (model.holders() < model.max_holders()) model.create();
      } else if (choice < 80) {
        std::vector<SequenceId> batch;
        int64_t step_room =
            std::min<int64_t>(limits.max_step_tokens, limits.total_tokens - model.total_tokens());
        for (int k = 0; k < 4 && step_room > 0; ++k) {
          const SequenceId id = model.pick();
          if (std::find(batch.begin(), batch.end(), id) != batch.end()) continue;
          const int64_t tokens = k == 3 ? step_room : model.random(1, step_room);
          step_room -= tokens;
          model.reserve(id, tokens, true);
          if (HasFatalFailure()) return;
          batch.push_back(id);
        }
        for (SequenceId id : batch) {
          model.accept(id);
          if (HasFatalFailure()) return;
        }
      } else if (choice < 86) {
        model.snapshot(model.pick());
      } else if (choice < 92) {
        const SequenceId id = model.pick();
        if (model.total_tokens() * 2 <= limits.total_tokens) model.fork(id, true);
      } else {
        model.release(model.pick());
      }
      if (HasFatalFailure()) return;
      model.check();
      if (HasFatalFailure()) return;
    }
    model.release_all();
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Geometries, KvCachePoolRandom,
                         ::testing::Values(Geometry{5, 4, 8, 0}, Geometry{5, 4, 8, 9},
                                           Geometry{1, 3, 2, 0}, Geometry{7, 1, 6, 3},
                                           Geometry{3, 16, 32, 0}, Geometry{16, 5, 4, 1}));

}  // namespace
}  // namespace dsv4
