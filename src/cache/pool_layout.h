// Where the caches of every layer lie inside the blocks of a pool, and how many blocks its limits
// ask for. Pure arithmetic: `plan` and the pool itself use the same numbers.
#pragma once
#include <cstdint>
#include <vector>

#include "dsv4/cache.h"

namespace dsv4 {

struct PoolLayout {
  static constexpr int64_t kPageAlignment = 64;
  static constexpr int64_t kAbsent = -1;

  /// Byte offsets of one layer's pages and rings inside a block or slot; kAbsent: not declared.
  struct Layer {
    int64_t window = kAbsent, compressed = kAbsent, index = kAbsent, state = kAbsent,
            index_state = kAbsent;
  };

  std::vector<Layer> layers;
  int64_t keep_tokens = 1;  ///< largest of the window specs
  int32_t growing_blocks = 0, window_blocks = 0, state_slots = 0;
  int64_t growing_block_bytes = 0, window_block_bytes = 0, state_slot_bytes = 0;

  /// Validates specs and limits. @throws Error kInvalidArgument naming layer, value and expected.
  PoolLayout(const std::vector<std::vector<CacheSpec>>& specs, const PoolLimits& limits);

  /// Everything free.
  PoolUsage usage(const PoolLimits& limits) const;
  /// First token of the window that the token at `length`, the next one, can see.
  int64_t first_visible(int64_t length) const {
    return length < keep_tokens ? 0 : length - keep_tokens + 1;
  }
};

}  // namespace dsv4
