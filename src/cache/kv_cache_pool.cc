// The pool: bookkeeping of sequences over three groups of blocks, and the copies of fork().
#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cache/block_allocator.h"
#include "cache/kv_format.h"
#include "cache/pool_layout.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "dsv4/cache.h"

namespace dsv4 {
namespace {

// One slab of equal blocks and who holds them.
struct Group {
  BlockAllocator allocator;
  int64_t block_bytes = 0;
  Buffer memory;

  std::byte* block(int32_t idx) const { return memory.data() + idx * block_bytes; }
};

// Window blocks of consecutive logical numbers, the first of which is `first`.
struct WindowTable {
  int64_t first = 0;
  std::vector<int32_t> blocks;
  int64_t end() const { return first + static_cast<int64_t>(blocks.size()); }
};

struct Snapshot {
  WindowTable window;
  int32_t state_slot = 0;
};

struct Sequence {
  int64_t length = 0;
  int64_t reserved = 0;  // tokens after `length` that a step may write
  std::vector<int32_t> growing;
  WindowTable window;
  int32_t state_slot = 0;
  std::map<int64_t, Snapshot> snapshots;  // by length
};

}  // namespace

struct KvCachePool::Impl {
  PoolLimits limits;
  PoolLayout layout;
  Device& device;
  Group growing, window, state;
  std::vector<LayerCaches> caches;
  std::unordered_map<SequenceId, Sequence> sequences;
  SequenceId next_id = 0;

  Impl(const std::vector<std::vector<CacheSpec>>& specs, const PoolLimits& limits_, Device& device_)
      : limits(limits_), layout(specs, limits_), device(device_) {
    layout.usage(limits);  // refuses sizes beyond 2^63 before anything is allocated
    make_group(growing, layout.growing_blocks, layout.growing_block_bytes);
    make_group(window, layout.window_blocks, layout.window_block_bytes);
    make_group(state, layout.state_slots, layout.state_slot_bytes);
    for (size_t i = 0; i < specs.size(); ++i) make_views(specs[i], layout.layers[i]);
  }

  void make_group(Group& group, int32_t num_blocks, int64_t block_bytes) {
    group.allocator = BlockAllocator(num_blocks, limits.shuffle_seed);
    group.block_bytes = block_bytes;
    if (block_bytes == 0) return;  // no layer has such a cache; block numbers still count
    group.memory = device.allocate(num_blocks * block_bytes);
    poison(group.memory.data(), num_blocks * block_bytes);
  }

  // In debug builds, 0xff: NaN in every row and scale format, so that a kernel that reads what
  // nobody wrote is found out.
  void poison([[maybe_unused]] std::byte* begin, [[maybe_unused]] int64_t bytes) {
#ifndef NDEBUG
    const std::vector<std::byte> pattern(static_cast<size_t>(std::min<int64_t>(bytes, 1 << 20)),
                                         std::byte{0xff});
    const auto chunk = static_cast<int64_t>(pattern.size());
    for (int64_t at = 0; at < bytes; at += chunk) {
      device.copy_to_device(begin + at, pattern.data(), std::min(chunk, bytes - at),
                            device.default_stream());
    }
    device.synchronize(device.default_stream());
#endif
  }

  void make_views(const std::vector<CacheSpec>& specs, const PoolLayout::Layer& offsets) {
    LayerCaches& out = caches.emplace_back();
    const auto paged = [](const Group& group, int64_t offset, const CacheSpec& spec, int rows) {
      return CacheView{.base = group.memory.data() + offset,
                       .block_stride_bytes = group.block_bytes,
                       .num_blocks = group.allocator.num_blocks(),
                       .rows_per_block = rows,
                       .format = spec.format,
                       .row_elems = spec.row_elems};
    };
    const auto ring = [&](int64_t offset, const CacheSpec& spec) {
      return StateView{.base = reinterpret_cast<float*>(state.memory.data() + offset),
                       .slot_stride_elems = state.block_bytes / int64_t{sizeof(float)},
                       .num_slots = state.allocator.num_blocks(),
                       .ring_rows = spec.keep_tokens,
                       .row_elems = spec.row_elems};
    };
    for (const CacheSpec& spec : specs) {
      const int growing_rows = limits.growing_block_tokens / spec.tokens_per_row;
      switch (spec.role) {
        case CacheRole::kWindow:
          out.window = paged(window, offsets.window, spec, limits.window_block_tokens);
          break;
        case CacheRole::kCompressed:
          out.compressed = paged(growing, offsets.compressed, spec, growing_rows);
          break;
        case CacheRole::kIndex:
          out.index = paged(growing, offsets.index, spec, growing_rows);
          break;
        case CacheRole::kState:
          out.state = ring(offsets.state, spec);
          break;
        case CacheRole::kIndexState:
          out.index_state = ring(offsets.index_state, spec);
          break;
      }
    }
  }

  // ---- blocks

  int32_t take(Group& group) {
    const int32_t block = group.allocator.take();
    if (group.block_bytes != 0) poison(group.block(block), group.block_bytes);
    return block;
  }

  int32_t take_copy(Group& group, int32_t source) {
    const int32_t block = group.allocator.take();
    if (group.block_bytes != 0) {
      device.copy_on_device(group.block(block), group.block(source), group.block_bytes,
                            device.default_stream());
    }
    return block;
  }

  int64_t growing_blocks_of(int64_t tokens) const {
    return ceil_div(tokens, limits.growing_block_tokens);
  }
  int64_t window_blocks_of(int64_t tokens) const {
    return ceil_div(tokens, limits.window_block_tokens);
  }
  // Logical number of the first window block that the token at `length` needs.
  int64_t first_window_block(int64_t length) const {
    return layout.first_visible(length) / limits.window_block_tokens;
  }

  // Gives back window blocks that no later token of the sequence can see.
  void trim(Sequence& sequence) {
    WindowTable& table = sequence.window;
    const int64_t count = first_window_block(sequence.length) - table.first;
    if (count <= 0) return;
    DSV4_CHECK(count <= static_cast<int64_t>(table.blocks.size()));
    for (int64_t i = 0; i < count; ++i) {
      window.allocator.release(table.blocks[static_cast<size_t>(i)]);
    }
    table.blocks.erase(table.blocks.begin(), table.blocks.begin() + count);
    table.first += count;
  }

  // Other sequences keep invisible blocks until they are asked for; here they are.
  bool have_window_blocks(int64_t count) {
    if (count <= window.allocator.num_free()) return true;
    for (auto& entry : sequences) trim(entry.second);
    return count <= window.allocator.num_free();
  }

  void resize(Group& group, std::vector<int32_t>& blocks, int64_t size) {
    while (static_cast<int64_t>(blocks.size()) > size) {
      group.allocator.release(blocks.back());
      blocks.pop_back();
    }
    while (static_cast<int64_t>(blocks.size()) < size) blocks.push_back(take(group));
  }

  void release(const Snapshot& snapshot) {
    for (int32_t block : snapshot.window.blocks) window.allocator.release(block);
    state.allocator.release(snapshot.state_slot);
  }

  // ---- sequences

  Sequence& find(SequenceId id) {
    const auto found = sequences.find(id);
    if (found == sequences.end()) {
      fail(ErrorCode::kInvalidArgument, "cache pool: sequence ", id,
           id >= 0 && id < next_id ? " was released" : " is unknown", "; ", sequences.size(),
           " sequences are alive");
    }
    return found->second;
  }

  bool reserve(Sequence& sequence, int64_t new_tokens) {
    const std::optional<int64_t> end = checked_add(sequence.length, new_tokens);
    if (new_tokens < 0 || !end || *end > std::numeric_limits<int64_t>::max() / 2) {
      fail(ErrorCode::kInvalidArgument, "cache pool: reservation of ", new_tokens, " tokens after ",
           sequence.length, ", expected 0 to 2^62");
    }
    trim(sequence);
    const int64_t growing_size = growing_blocks_of(*end);
    const int64_t window_size = window_blocks_of(*end) - sequence.window.first;
    const int64_t more_growing = growing_size - static_cast<int64_t>(sequence.growing.size());
    const int64_t more_window = window_size - static_cast<int64_t>(sequence.window.blocks.size());
    if (more_growing > growing.allocator.num_free() || !have_window_blocks(more_window)) {
      return false;
    }
    resize(growing, sequence.growing, growing_size);
    resize(window, sequence.window.blocks, window_size);
    sequence.reserved = new_tokens;
    return true;
  }

  // Blocks of the window that the token at `length` sees, each with one more reference.
  WindowTable share_window(const WindowTable& source, int64_t length) {
    WindowTable out{.first = first_window_block(length), .blocks = {}};
    for (int64_t i = out.first; i < window_blocks_of(length); ++i) {
      const int32_t block = source.blocks[static_cast<size_t>(i - source.first)];
      window.allocator.retain(block);
      out.blocks.push_back(block);
    }
    return out;
  }

  bool snapshot(Sequence& sequence) {
    if (sequence.snapshots.contains(sequence.length)) return true;
    if (state.allocator.num_free() == 0) return false;
    // Rows before `length` are final, so the partial blocks can be shared with their writer.
    sequence.snapshots.emplace(sequence.length,
                               Snapshot{.window = share_window(sequence.window, sequence.length),
                                        .state_slot = take_copy(state, sequence.state_slot)});
    return true;
  }

  std::optional<SequenceId> fork(SequenceId id, int64_t tokens) {
    Sequence& source = find(id);
    const auto restored = source.snapshots.find(tokens);
    const bool is_current = tokens == source.length;
    if (!is_current && restored == source.snapshots.end()) {
      std::string lengths = std::to_string(source.length);
      for (const auto& entry : source.snapshots) lengths += ", " + std::to_string(entry.first);
      fail(ErrorCode::kInvalidArgument, "cache pool: sequence ", id, " cannot be forked at ",
           tokens, " tokens, expected its length or that of a snapshot: ", lengths);
    }
    const bool growing_is_partial = tokens % limits.growing_block_tokens != 0;
    const bool window_is_partial = tokens % limits.window_block_tokens != 0;
    if (state.allocator.num_free() == 0 ||
        growing.allocator.num_free() < (growing_is_partial ? 1 : 0) ||
        !have_window_blocks(window_is_partial ? 1 : 0)) {
      return std::nullopt;
    }

    Sequence child;
    child.length = tokens;
    child.growing.assign(source.growing.begin(),
                         source.growing.begin() + growing_blocks_of(tokens));
    for (int32_t block : child.growing) growing.allocator.retain(block);
    if (growing_is_partial) own_last(growing, child.growing);
    child.window = share_window(is_current ? source.window : restored->second.window, tokens);
    if (window_is_partial) own_last(window, child.window.blocks);
    child.state_slot =
        take_copy(state, is_current ? source.state_slot : restored->second.state_slot);
    sequences.emplace(next_id, std::move(child));
    return next_id++;
  }

  // The last block will be written by its holder: replaces the shared one by a copy.
  void own_last(Group& group, std::vector<int32_t>& blocks) {
    const int32_t shared = blocks.back();
    blocks.back() = take_copy(group, shared);
    group.allocator.release(shared);
  }
};

KvCachePool::KvCachePool(std::vector<std::vector<CacheSpec>> specs, const PoolLimits& limits,
                         Device& device)
    : impl_(std::make_unique<Impl>(specs, limits, device)) {}

KvCachePool::~KvCachePool() = default;

PoolUsage KvCachePool::plan(const std::vector<std::vector<CacheSpec>>& specs,
                            const PoolLimits& limits) {
  return PoolLayout(specs, limits).usage(limits);
}

std::optional<SequenceId> KvCachePool::create() {
  if (impl_->state.allocator.num_free() == 0) return std::nullopt;
  Sequence sequence;
  sequence.state_slot = impl_->take(impl_->state);
  impl_->sequences.emplace(impl_->next_id, std::move(sequence));
  return impl_->next_id++;
}

bool KvCachePool::reserve(SequenceId sequence, int64_t new_tokens) {
  return impl_->reserve(impl_->find(sequence), new_tokens);
}

void KvCachePool::reserve_step(std::span<const BatchEntry> batch) {
  size_t reserved = 0;
  try {
    for (; reserved < batch.size(); ++reserved) {
      const auto& [sequence, num_tokens] = batch[reserved];
      if (reserve(sequence, num_tokens)) continue;
      const PoolUsage now = usage();
      fail(ErrorCode::kOutOfMemory, "no room for ", num_tokens, " tokens of sequence ", sequence,
           ": ", now.growing_blocks_free, " of ", now.growing_blocks, " growing blocks and ",
           now.window_blocks_free, " of ", now.window_blocks, " window blocks are free");
    }
  } catch (...) {
    for (const BatchEntry& entry : batch.first(reserved)) reserve(entry.sequence, 0);
    throw;
  }
}

void KvCachePool::advance(SequenceId sequence, int64_t tokens) {
  Sequence& entry = impl_->find(sequence);
  if (tokens < 0 || tokens > entry.reserved) {
    fail(ErrorCode::kInvalidArgument, "cache pool: sequence ", sequence, " advances by ", tokens,
         " tokens, expected 0 to the ", entry.reserved, " reserved");
  }
  entry.length += tokens;
  entry.reserved -= tokens;
}

void KvCachePool::release(SequenceId sequence) {
  const Sequence& entry = impl_->find(sequence);
  for (int32_t block : entry.growing) impl_->growing.allocator.release(block);
  for (int32_t block : entry.window.blocks) impl_->window.allocator.release(block);
  for (const auto& snapshot : entry.snapshots) impl_->release(snapshot.second);
  impl_->state.allocator.release(entry.state_slot);
  impl_->sequences.erase(sequence);
}

std::optional<SequenceId> KvCachePool::fork(SequenceId sequence, int64_t tokens) {
  return impl_->fork(sequence, tokens);
}

bool KvCachePool::snapshot(SequenceId sequence) {
  return impl_->snapshot(impl_->find(sequence));
}

int64_t KvCachePool::length(SequenceId sequence) const {
  return impl_->find(sequence).length;
}

int32_t KvCachePool::state_slot(SequenceId sequence) const {
  return impl_->find(sequence).state_slot;
}

std::span<const int32_t> KvCachePool::growing_blocks(SequenceId sequence) const {
  return impl_->find(sequence).growing;
}

KvCachePool::WindowBlocks KvCachePool::window_blocks(SequenceId sequence) const {
  const WindowTable& table = impl_->find(sequence).window;
  return {table.first * impl_->limits.window_block_tokens, table.blocks};
}

const PoolLimits& KvCachePool::limits() const {
  return impl_->limits;
}

LayerCaches KvCachePool::caches(int layer_idx) const {
  const auto num_layers = static_cast<int>(impl_->caches.size());
  if (layer_idx < 0 || layer_idx >= num_layers) {
    fail(ErrorCode::kInvalidArgument, "cache pool: layer ", layer_idx, ", expected 0 to ",
         num_layers - 1);
  }
  return impl_->caches[static_cast<size_t>(layer_idx)];
}

PoolUsage KvCachePool::usage() const {
  PoolUsage out = impl_->layout.usage(impl_->limits);
  out.growing_blocks_free = impl_->growing.allocator.num_free();
  out.window_blocks_free = impl_->window.allocator.num_free();
  out.state_slots_free = impl_->state.allocator.num_free();
  return out;
}

}  // namespace dsv4
