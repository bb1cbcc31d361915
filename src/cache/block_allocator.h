// Numbers of equal blocks, handed out and taken back by reference count. Knows nothing of memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <vector>

namespace dsv4 {

/// Hands out the free block that comes first in a fixed order: ascending with seed 0, else a
/// permutation that depends on the seed only. So the same calls give the same blocks, always.
class BlockAllocator {
 public:
  BlockAllocator() = default;
  BlockAllocator(int32_t num_blocks, uint64_t shuffle_seed);

  int32_t num_blocks() const { return static_cast<int32_t>(references_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_ranks_.size()); }
  int32_t references(int32_t block) const { return references_[static_cast<size_t>(block)]; }

  /// A free block, with one reference. The caller has checked num_free().
  int32_t take();
  /// One more holder of a block in use.
  void retain(int32_t block);
  /// One holder fewer; the last one frees the block.
  void release(int32_t block);

 private:
  std::vector<int32_t> order_;       // rank -> block
  std::vector<int32_t> rank_;        // block -> rank
  std::vector<int32_t> references_;  // block -> holders
  std::priority_queue<int32_t, std::vector<int32_t>, std::greater<>> free_ranks_;
};

}  // namespace dsv4
