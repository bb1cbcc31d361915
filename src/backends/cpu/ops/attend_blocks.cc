// Which rows a token attends to, block by block, in the canonical order (ReductionGrid).
#include <algorithm>

#include "backends/cpu/ops/attend.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

// Walks consecutive rows of a paged list: one division at the start, none per row.
class RangeCursor {
 public:
  RangeCursor(const RangeRows& rows, int64_t seq, int64_t row)
      : view_(rows.cache),
        blocks_(rows.blocks),
        layout_(row_layout(rows.cache.format, rows.cache.row_elems)),
        table_(rows.blocks.table + seq * rows.blocks.stride),
        logical_(row / rows.blocks.tokens_per_block),
        offset_(row - logical_ * rows.blocks.tokens_per_block) {
    open();
  }
  RowRef take() {
    if (offset_ == blocks_.tokens_per_block) {
      ++logical_;
      offset_ = 0;
      open();
    }
    const RowAddress row = row_in_page(page_, view_.rows_per_block, offset_++, layout_);
    return {row.values, row.scales};
  }

 private:
  void open() { page_ = block_pointer(view_, table_[logical_ % blocks_.columns]); }

  const CacheView& view_;
  const BlockTable& blocks_;
  RowLayout layout_;
  const int32_t* table_;
  int64_t logical_, offset_;
  std::byte* page_ = nullptr;
};

void describe_rows(const CacheView& cache, BlockRows& block) {
  block.format = cache.format;
  block.row_bytes = static_cast<int>(row_layout(cache.format, cache.row_elems).value_bytes);
}

void append_pair(BlockRows& block, RowRef even, RowRef odd) {
  if (even.values == nullptr && odd.values == nullptr) return;
  block.active |= uint64_t{even.values != nullptr} << block.count | uint64_t{odd.values != nullptr}
                                                                        << (block.count + 1);
  block.rows[block.count++] = even;
  block.rows[block.count++] = odd;
}

// Rows of a token that are listed, padded or flat; none where `rows` holds ranges or nothing.
struct TokenList {
  const CacheView* cache = nullptr;
  const int32_t* slots = nullptr;
  int64_t length = 0;
};
template <typename Rows>
TokenList list_of(const Rows& rows, int64_t token) {
  if (const auto* list = std::get_if<ListedRows>(&rows); list != nullptr && list->length != nullptr)
    return {&list->cache, list->slots + token * list->stride, std::max(0, list->length[token])};
  if (const auto* flat = std::get_if<RaggedRows>(&rows)) {
    const int32_t begin = flat->indptr[token];
    return {&flat->cache, flat->slots + begin, flat->indptr[token + 1] - begin};
  }
  return {};
}

// Window rows of a token: positions, or places of its list.
struct PlacesOfToken {
  int64_t begin = 0, end = 0;
};
PlacesOfToken window_places(const AttendParams& params, int64_t token) {
  if (const auto* range = std::get_if<RangeRows>(&params.window)) {
    if (range->begin == nullptr) return {};
    return {range->begin[token], range->end[token]};
  }
  return {0, list_of(params.window, token).length};
}

}  // namespace

TokenBlocks::TokenBlocks(const AttendParams& params, int64_t token)
    : params_(params),
      token_(token),
      seq_(params.token_to_seq == nullptr ? 0 : params.token_to_seq[token]),
      rows_per_block_(params.grid.rows_per_block) {
  DSV4_CHECK(rows_per_block_ >= 2 && rows_per_block_ <= kMaxBlockRows && rows_per_block_ % 2 == 0);
  DSV4_CHECK(params.grid.blocks_per_chain >= 1);
  if (const auto* range = std::get_if<RangeRows>(&params.compressed)) {
    if (range->begin[token] < range->end[token]) {
      first_compressed_ = range->begin[token] / rows_per_block_;
      last_compressed_ = ceil_div(range->end[token], rows_per_block_);
    }
  } else {
    last_compressed_ = ceil_div(list_of(params.compressed, token).length, rows_per_block_);
  }
  num_chains_ = std::max<int64_t>(1, ceil_div(last_compressed_, params.grid.blocks_per_chain));
  select_chains(0, num_chains_);
}

void TokenBlocks::select_chains(int64_t begin, int64_t end) {
  const int64_t blocks_per_chain = params_.grid.blocks_per_chain;
  window_place_ = window_end_ = 0;
  const PlacesOfToken window = window_places(params_, token_);
  if (begin == 0 && window.begin < window.end) {
    window_place_ = window.begin;
    window_end_ = window.end;
  }
  compressed_block_ = std::max(first_compressed_, begin * blocks_per_chain);
  compressed_end_ = std::min(last_compressed_, end * blocks_per_chain);
}

bool TokenBlocks::next(BlockRows& block, int64_t& chain) {
  while (true) {
    block.count = 0;
    block.active = 0;
    if (window_place_ < window_end_) {
      chain = 0;
      const int64_t first = window_place_;
      window_place_ += rows_per_block_;
      if (const auto* range = std::get_if<RangeRows>(&params_.window)) {
        describe_rows(range->cache, block);
        fill_range(*range, first, block);
      } else {
        const TokenList list = list_of(params_.window, token_);
        fill_list(*list.cache, {list.slots, static_cast<size_t>(list.length)}, first, block);
      }
    } else if (compressed_block_ < compressed_end_) {
      const int64_t first = compressed_block_ * rows_per_block_;
      chain = compressed_block_++ / params_.grid.blocks_per_chain;
      if (const auto* range = std::get_if<RangeRows>(&params_.compressed)) {
        describe_rows(range->cache, block);
        fill_range(*range, first, block);
      } else {
        const TokenList list = list_of(params_.compressed, token_);
        fill_list(*list.cache, {list.slots, static_cast<size_t>(list.length)}, first, block);
      }
    } else {
      return false;
    }
    if (block.count != 0) return true;
  }
}

void TokenBlocks::fill_range(const RangeRows& rows, int64_t first, BlockRows& block) const {
  const int64_t begin = std::max<int64_t>(first, rows.begin[token_]);
  const int64_t end = std::min<int64_t>(first + rows_per_block_, rows.end[token_]);
  if (begin >= end) return;
  RangeCursor cursor(rows, seq_, begin);
  constexpr RowRef kMasked{nullptr, nullptr};
  // Pairs are counted from `first`; before `begin` lies nothing that is read.
  for (int64_t row = begin - (begin - first) % 2; row < end; row += 2) {
    const RowRef even = row >= begin ? cursor.take() : kMasked;
    const RowRef odd = row + 1 < end ? cursor.take() : kMasked;
    append_pair(block, even, odd);
  }
}

void TokenBlocks::fill_list(const CacheView& cache, std::span<const int32_t> slots, int64_t first,
                            BlockRows& block) const {
  describe_rows(cache, block);
  const int64_t end = std::min<int64_t>(first + rows_per_block_, std::ssize(slots));
  const auto resolve = [&](int64_t i) -> RowRef {
    if (i >= end || slots[static_cast<size_t>(i)] < 0) return {nullptr, nullptr};
    const RowAddress row = row_address(cache, slots[static_cast<size_t>(i)]);
    return {row.values, row.scales};
  };
  for (int64_t i = first; i < end; i += 2) append_pair(block, resolve(i), resolve(i + 1));
}

}  // namespace dsv4::cpu
