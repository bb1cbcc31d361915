#include "cache/block_allocator.h"

#include <numeric>
#include <utility>

#include "core/fail.h"

namespace dsv4 {
namespace {

// SplitMix64: the same numbers with every standard library, unlike std::shuffle.
uint64_t next_random(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace

BlockAllocator::BlockAllocator(int32_t num_blocks, uint64_t shuffle_seed)
    : order_(static_cast<size_t>(num_blocks)),
      rank_(static_cast<size_t>(num_blocks)),
      references_(static_cast<size_t>(num_blocks), 0) {
  std::iota(order_.begin(), order_.end(), 0);
  if (shuffle_seed != 0) {
    for (size_t i = order_.size(); i > 1; --i) {
      std::swap(order_[i - 1], order_[next_random(shuffle_seed) % i]);
    }
  }
  std::vector<int32_t> ranks(order_.size());
  std::iota(ranks.begin(), ranks.end(), 0);
  for (int32_t rank : ranks) rank_[static_cast<size_t>(order_[static_cast<size_t>(rank)])] = rank;
  free_ranks_ = decltype(free_ranks_)(std::greater<>(), std::move(ranks));
}

int32_t BlockAllocator::take() {
  DSV4_CHECK(!free_ranks_.empty());
  const int32_t block = order_[static_cast<size_t>(free_ranks_.top())];
  free_ranks_.pop();
  DSV4_CHECK(references_[static_cast<size_t>(block)] == 0);
  references_[static_cast<size_t>(block)] = 1;
  return block;
}

void BlockAllocator::retain(int32_t block) {
  DSV4_CHECK(references_[static_cast<size_t>(block)] > 0);
  ++references_[static_cast<size_t>(block)];
}

void BlockAllocator::release(int32_t block) {
  DSV4_CHECK(references_[static_cast<size_t>(block)] > 0);
  if (--references_[static_cast<size_t>(block)] == 0) {
    free_ranks_.push(rank_[static_cast<size_t>(block)]);
  }
}

}  // namespace dsv4
