// How the roles of sm90_attend count blocks and find rows: the walk over a CTA's items, block by
// block, and the addresses that it leaves for the loader.
#pragma once
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90.h"
#include "backends/nvidia/ops/attend_sm90_deal.cuh"
#include "backends/nvidia/ops/attend_sm90_traits.h"

namespace dsv4::nvidia::sm90_attend {

using namespace sm80;  // NOLINT: kernel code, not included by others
using namespace sm90;  // NOLINT: kernel code, not included by others

/// Number of the thread within its role; read anew wherever it is used, because registers are
/// short.
__device__ __forceinline__ int thread_of_role() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 127;
}

__device__ __forceinline__ int role_of_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread >> 7;
}

/// Where a row lies, in 8 bytes of shared memory; 0: masked. Its address is a multiple of 8 below
/// 2^48; its scale bytes are a multiple of 8 and less than 2^22 behind it.
struct RowAddress {
  uint64_t bits;

  __device__ __forceinline__ static RowAddress of(const std::byte* values, int to_scales) {
    return {reinterpret_cast<uint64_t>(values) << 16 | static_cast<uint32_t>(to_scales) >> 3};
  }
  /// Row `row` of a page.
  template <typename Traits>
  __device__ __forceinline__ static RowAddress in_page(const RowSource& rows, int page, int row) {
    const std::byte* values = rows.base + page * rows.block_stride_bytes;
    const int to_scales = rows.rows_per_block * Traits::kRowBytes - row * (Traits::kRowBytes - 8);
    return of(values + static_cast<uint32_t>(row * Traits::kRowBytes),
              Traits::kHasScales ? to_scales : 0);
  }
  __device__ __forceinline__ bool valid() const { return bits != 0; }
  __device__ __forceinline__ const std::byte* values() const {
    return reinterpret_cast<const std::byte*>(bits >> 19 << 3);
  }
  __device__ __forceinline__ int to_scales() const {
    return static_cast<int>(static_cast<uint32_t>(bits) << 13 >> 10);
  }
};

/// Into the L2; 4 lanes a row.
template <typename Traits>
__device__ __forceinline__ void prefetch_row(RowAddress row, int lane) {
  constexpr int kLine = 128;
  if (!row.valid()) return;
#pragma unroll
  for (int at = 0; at < Traits::kRowBytes; at += 4 * kLine) {
    if (at + lane * kLine < Traits::kRowBytes) prefetch_l2(row.values() + at + lane * kLine);
  }
  if (Traits::kHasScales && lane == 3) prefetch_l2(row.values() + row.to_scales());
}

/// Phase parity of a barrier that serves every kEvery-th block.
template <int kEvery>
__device__ __forceinline__ uint32_t phase_of(int block) {
  return static_cast<uint32_t>(block / kEvery) & 1;
}

/// By one thread.
template <typename Traits>
__device__ __forceinline__ void init_barriers(Barriers<Traits>& barriers) {
  for (int i = 0; i < Traits::kStages; ++i) {
    mbarrier_init(shared_address(&barriers.rows_full[i][0]), 128);
    mbarrier_init(shared_address(&barriers.rows_full[i][1]), 128);
    mbarrier_init(shared_address(&barriers.rows_empty[i][0]), 128);
    mbarrier_init(shared_address(&barriers.rows_empty[i][1]), 128);
  }
  for (uint64_t& known : barriers.blocks_known) {
    mbarrier_init(shared_address(&known), 128);
  }
  mbarrier_init(shared_address(&barriers.places_known), 128);
  mbarrier_init(shared_address(&barriers.p_full), 128);
  mbarrier_init(shared_address(&barriers.p_empty), 256);
  mbarrier_init(shared_address(&barriers.factors_known), 128);
  mbarrier_init(shared_address(&barriers.query_full[0]), 1);
  mbarrier_init(shared_address(&barriers.query_full[1]), 1);
  mbarrier_init(shared_address(&barriers.query_taken), 128);
  mbarrier_init(shared_address(&barriers.output_read), 1);
  for (uint64_t& full : barriers.parts_full) mbarrier_init(shared_address(&full), 1);
}

/// Into the L2, by a warpgroup: numbers and lists of a token.
__device__ __forceinline__ void prefetch_lists(const AttendSm90Args& args, int token, int thread) {
  constexpr int kLine = 32;  // slots of 128 bytes
  for (const RowSource* rows : {&args.attend.window, &args.attend.compressed}) {
    if (rows->kind == RowSource::kList && thread * kLine < rows->slots_stride) {
      prefetch_l2(rows->slots + token * rows->slots_stride + thread * kLine);
    }
    if (thread == 0 && rows->begin != nullptr) prefetch_l2(rows->begin + token);
    if (thread == 0 && rows->end != nullptr) prefetch_l2(rows->end + token);
  }
  if (thread == 0 && args.attend.token_to_seq != nullptr) {
    prefetch_l2(args.attend.token_to_seq + token);
  }
}

/// Into the L2, by a warpgroup, where the window is a range and a list follows, for which a call
/// must wait: every `kParts`-th row of a token's window, from `part` on.
template <typename Traits, int kParts>
__device__ __forceinline__ void prefetch_window(const AttendSm90Args& args, int token, int part,
                                                int thread) {
  const RowSource& rows = args.attend.window;
  if (rows.kind != RowSource::kRange || args.starts_early || thread % kParts != part) return;
  const int row = __ldg(rows.begin + token) + thread;
  if (row >= __ldg(rows.end + token)) return;
  const int block = args.window_rows.divide(row);
  const int column = block - args.window_columns.divide(block) * args.window_columns.divisor;
  const int page =
      __ldg(rows.table + __ldg(args.attend.token_to_seq + token) * rows.table_stride + column);
  if (page < 0) return;
  const auto found =
      RowAddress::in_page<Traits>(rows, page, row - block * args.window_rows.divisor);
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) prefetch_row<Traits>(found, lane);
}

/// The blocks of this CTA's items in order: `fetch` reads where the rows of the next block lie, the
/// `resolve` after it turns that into addresses. Items lie chain by chain, so that chains that most
/// tokens lack come last; lanes look at 32 items at once and pass over those without rows. With
/// kDealt they are those of dealt_share.
///
/// `fetch` runs in the warps of one output role and `resolve` in those of the other, which have
/// time but no registers, so that all is kept in shared memory between calls. Warp w finds the rows
/// of loader warp w, 16 of a block.
template <typename Traits, bool kDealt>
struct BlockWalk {
  const AttendSm90Args& args;
  WalkStorage<Traits>& shared;

  /// Into the L2, while the kernel before may still run, what is read first and can be named
  /// already: numbers and list of the first item, and its query.
  __device__ __forceinline__ void prefetch_first() const {
    const int thread = thread_of_role();
    int item = static_cast<int>(blockIdx.x);
    if constexpr (kDealt) {
      const DealtShare share = dealt_share(args);
      item = share.head >= 0 ? share.head : min(share.first, args.num_items - 1);
    }
    const TokenPlace place = place_of(item);
    const int token = place.token;
    prefetch_lists(args, token, thread);
    if (writes()) {
      const int head = place.tile * 64, first = (thread >> 5) * 256;
      prefetch_box(args.q_map, first, head, token);
      prefetch_box(args.q_map, first + 128, head, token);
    }
  }
  /// Asks for the first item.
  __device__ __forceinline__ void start() const {
    if (writes()) {
      state() = {};
      state().next_items = static_cast<int>(blockIdx.x);
      if constexpr (kDealt) {
        const DealtShare share = dealt_share(args);
        state().share = share;
        state().next_items = share.head >= 0 ? -1 : share.first;
      }
    }
    __syncwarp();
    look_ahead(state());
  }
  /// The blocks that are taken for granted: first two, which the loader begins with. Loops that
  /// are not unrolled: this is long code, in no cache when a call begins.
  __device__ __forceinline__ void get_ahead(Barriers<Traits>& barriers) const {
    int known = 0;
#pragma unroll 1
    for (int batch = 0; batch < 3; ++batch) {
      const int end = batch == 0   ? 2
                      : batch == 1 ? Traits::kBlocksAhead
                                   : Traits::kBlocksAhead + Traits::kBlocksFetched;
#pragma unroll 1
      for (int i = known; i < end; ++i) fetch(i);
      if (batch < 2) {
#pragma unroll 1
        for (int i = known; i < end; ++i) resolve(i);
        mbarrier_arrive(shared_address(&barriers.blocks_known[batch]));
      } else {
        copy_async_wait<0>();
        mbarrier_arrive(shared_address(&barriers.places_known));
      }
      known = end;
    }
  }
  /// For every block, by the role that walks, which waits for what it has asked for before it gives
  /// back P of that block.
  __device__ __forceinline__ void find_places(int block) const {
    fetch(block + Traits::kBlocksAhead + Traits::kBlocksFetched);
  }
  /// By the other one, when it has P of that block.
  __device__ __forceinline__ void find_addresses(int block) const {
    resolve((block + Traits::kBlocksAhead) % Traits::kAddressSlots);
  }

 private:
  __device__ __forceinline__ WalkState& state() const {
    return shared.states[thread_of_role() >> 5];
  }
  /// Filled asynchronously, and so always in shared memory.
  __device__ __forceinline__ ComingItem& coming() const {
    return shared.states[thread_of_role() >> 5].coming;
  }
  /// Who changes the state.
  __device__ __forceinline__ bool writes() const {
    return (thread_of_role() & 31) == 0;
  }
  /// Whether a lane has a row.
  __device__ __forceinline__ bool has_row() const {
    return (thread_of_role() & 31) < 16;
  }
  __device__ __forceinline__ int row_of_block() const {
    const int warp = thread_of_role() >> 5, lane = thread_of_role() & 31;
    return (lane >> 3 & 1) * 32 + warp * 8 + (lane & 7);
  }
  __device__ __forceinline__ uint32_t address_of_row(int slot) const {
    const int warp = thread_of_role() >> 5, lane = thread_of_role() & 31;
    return shared_address(&shared.addresses[warp][slot][lane]);
  }

  /// Asks for the places of block `block_idx`, one more than in the last call. Past the end: a
  /// header with token -1, rows that are all masked.
  __device__ __forceinline__ void fetch(int block_idx) const {
    WalkState& state = this->state();
    uint32_t flags = state.inside != 0 ? 0 : kFirstBlock;
    if (state.inside == 0) start_item(state);
    if constexpr (kDealt) {
      if (flags != 0 && state.part == kItemTail) flags = kTakenOver;
      if (state.part == kItemHead) flags |= kHandedOver;
    }
    const int first = state.first, token = state.token;
    const bool compressed = state.compressed != 0;
    const int row = first + row_of_block();
    const RowSource& rows = compressed ? args.attend.compressed : args.attend.window;
    int offset = kNoRow;
    const int32_t* from = state.places;
    if (row >= state.begin && row < state.end) {
      if (rows.kind == RowSource::kRange) {
        const FastDivisor& by_rows = compressed ? args.compressed_rows : args.window_rows;
        const FastDivisor& by_columns = compressed ? args.compressed_columns : args.window_columns;
        const int block = by_rows.divide(row);
        offset = row - block * by_rows.divisor;
        from += block - by_columns.divide(block) * by_columns.divisor;
      } else {
        offset = kListRow;
        from += row;
      }
      if (compressed) offset |= kCompressedRow;
    }
    const bool ends = first + 64 >= state.end;
    const bool more = !ends || (!compressed && state.entry_end > 0);
    // A source that begins in a later part leaves the window as a part of its own.
    const bool ends_part = ends ? !compressed && state.entry_begin >= args.part_rows
                                : compressed && end_of_part(first);
    if (!more) flags |= kLastBlock;
    if (more && ends_part) flags |= kEndOfPart;
    if (state.later_part != 0) flags |= kLaterPart;
    __syncwarp();
    if (has_row()) {
      const uint32_t place = address_of_row(block_idx % Traits::kAddressSlots);
      copy_async_4(place, from, offset >= 0 ? 4 : 0);
      store_shared(place + 4, static_cast<uint32_t>(offset));
    }
    if (writes()) {
      if (thread_of_role() == 0) {
        if (state.only_chain != 0) flags |= kOnlyChain;
        if (state.odd_item != 0) flags |= kOddItem;
        store_shared_2(shared_address(&shared.headers[block_idx % Traits::kHeaderSlots]),
                       static_cast<uint32_t>(token), state.tile | state.chain << 8 | flags << 24);
      }
      state.inside = more;
      state.later_part = more && (state.later_part != 0 || ends_part);
      state.first = first + 64;
      if (ends && more) start_source(state, true, state.entry_begin, state.entry_end);
    }
    copy_async_commit();
    __syncwarp();
  }

  /// Addresses of a block whose places have been fetched, in their slot.
  __device__ __forceinline__ void resolve(int slot) const {
    copy_async_wait<0>();
    if (has_row()) {
      const uint32_t at = address_of_row(slot);
      const uint2 place = load_shared_2(at);
      const auto tagged = static_cast<int>(place.y);
      const bool compressed = (tagged & kCompressedRow) != 0;
      const RowSource& rows = compressed ? args.attend.compressed : args.attend.window;
      int block = static_cast<int>(place.x), offset = tagged & kListRow;
      const bool masked = tagged < 0 || block < 0;
      if (offset == kListRow) {
        const FastDivisor& by_rows = compressed ? args.compressed_rows : args.window_rows;
        block = by_rows.divide(static_cast<int>(place.x));
        offset = static_cast<int>(place.x) - block * by_rows.divisor;
      }
      uint64_t bits = RowAddress::in_page<Traits>(rows, block, offset).bits;
      if (masked) bits = 0;
      store_shared_2(at, static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32));
    }
  }

  // tagged: row within its page, or kListRow; kCompressedRow tells the source; kNoRow: masked
  static constexpr int kNoRow = -1;
  static constexpr int kCompressedRow = 1 << 30;
  static constexpr int kListRow = kCompressedRow - 1;

  // Whether the block from compressed row `first` on is the last one of a part.
  __device__ __forceinline__ bool end_of_part(int first) const {
    return ((first + 64) & (args.part_rows - 1)) == 0;
  }

  // By those that write.
  __device__ __forceinline__ void start_source(WalkState& state, bool compressed, int begin,
                                               int end) const {
    const RowSource& rows = compressed ? args.attend.compressed : args.attend.window;
    state.compressed = compressed;
    state.begin = begin;
    state.end = end;
    state.first = compressed ? begin & ~63 : begin;
    state.places = rows.kind == RowSource::kList ? rows.slots + state.token * rows.slots_stride
                                                 : rows.table + state.seq * rows.table_stride;
  }

  __device__ __forceinline__ void start_item(WalkState& state) const {
    copy_async_wait<0>();
    __syncwarp();
    if (writes()) {
      const ComingItem coming = this->coming();
      const bool exists = coming.item >= 0;
      const int item = !exists ? 0 : kDealt ? coming.item & kItemBits : coming.item;
      const TokenPlace place = place_of(item);
      const int token = exists ? place.token : -1;
      int window_begin = coming.window_begin, window_end = coming.window_end;
      if (!exists || place.chain > 0 || window_begin >= window_end) window_begin = window_end = 0;
      int begin = coming.entry_begin, end = coming.entry_end;
      bool only = true;
      if constexpr (kDealt) {
        const int part = exists ? coming.item >> kItemShift : kWholeItem;
        if (part != kWholeItem) clip_to_part(part, window_begin, window_end, begin, end);
        if (begin >= end) begin = end = 0;
        state.part = static_cast<uint32_t>(part);
        only = part != kItemHead;
      } else {
        only = clip_to_chain(place.chain, begin, end);
      }
      if (!exists) begin = end = 0;
      state.token = token;
      state.seq = coming.seq;
      state.entry_begin = begin;
      state.entry_end = end;
      state.chain = static_cast<uint32_t>(place.chain);
      state.tile = static_cast<uint32_t>(place.tile);
      state.only_chain = only;
      state.odd_item ^= 1;
      const bool compressed = window_begin >= window_end;
      start_source(state, compressed, compressed ? begin : window_begin,
                   compressed ? end : window_end);
    }
    __syncwarp();
    look_ahead(state);
  }

  // Chooses the item after the current one and asks for its numbers.
  __device__ __forceinline__ void look_ahead(WalkState& state) const {
    const int lane = thread_of_role() & 31;
    [[maybe_unused]] const int stride = static_cast<int>(gridDim.x);
    int next_items = state.next_items;
    int item, coming_item;
    if constexpr (kDealt) {
      const DealtShare& share = state.share;
      int part = kWholeItem;
      item = -1;
      if (next_items < 0) {
        item = share.head;
        part = kItemHead;
      } else if (next_items < share.past) {
        item = next_items;
      } else if (next_items == share.past && share.tail >= 0) {
        item = share.tail;
        part = kItemTail;
      }
      coming_item = item < 0 ? -1 : item | part << kItemShift;
      __syncwarp();
      if (writes()) state.next_items = next_items < 0 ? share.first : next_items + 1;
    } else {
      uint32_t pending = state.pending;
      __syncwarp();
      while (pending == 0 && next_items < args.num_items) {
        pending = __ballot_sync(~0u, has_work(next_items + lane * stride));
        next_items += 32 * stride;
      }
      coming_item = item = pending == 0 ? -1 : next_items + (__ffs(pending) - 33) * stride;
      if (writes()) {
        state.next_items = next_items;
        state.pending = pending & (pending - 1);
      }
    }
    if (lane == 0) coming().item = coming_item;
    if (lane < 5) {
      const AttendArgs& attend = args.attend;
      const int32_t* from = attend.token_to_seq;
      if (lane == 1) from = attend.window.begin;
      if (lane == 2) from = attend.window.end;
      if (lane == 3) from = attend.compressed.begin;
      if (lane == 4) from = attend.compressed.end;
      const bool valid = item >= 0 && from != nullptr;  // null: lists begin at 0, no rows end there
      int token = 0;
      if (valid) token = place_of(item).token;
      copy_async_4(shared_address(&coming().seq) + 4 * lane, from + token, valid ? 4 : 0);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ bool has_work(int item) const {
    if (item >= args.num_items) return false;
    const int chain = chain_of(item);
    if (chain == 0) return true;
    const int token = (item - chain * args.chain_items.divisor) >> args.log2_tiles;
    const RowSource& rows = args.attend.compressed;
    int begin = rows.begin != nullptr ? __ldg(rows.begin + token) : 0;
    int end = __ldg(rows.end + token);
    clip_to_chain(chain, begin, end);
    return begin < end;
  }
  struct TokenPlace {
    int token, tile, chain;
  };
  __device__ __forceinline__ TokenPlace place_of(int item) const {
    const int chain = chain_of(item), rest = item - chain * args.chain_items.divisor;
    const int token = rest >> args.log2_tiles;
    return {token, rest - (token << args.log2_tiles), chain};
  }
  __device__ __forceinline__ int chain_of(int item) const {
    return args.chain_items.divide(item);
  }
  // Of a token's entries those of a chain; true where that is its only one.
  __device__ __forceinline__ bool clip_to_chain(int chain, int& begin, int& end) const {
    const int chain_rows = args.attend.blocks_per_chain * 64;
    const bool only = begin >= end || end <= chain_rows;
    begin = max(begin, chain * chain_rows);
    end = min(end, (chain + 1) * chain_rows);
    if (begin >= end) begin = end = 0;
    return only;
  }
  // Of an item that is cut, its blocks before or behind the cut.
  __device__ __forceinline__ void clip_to_part(int part, int& window_begin, int& window_end,
                                               int& begin, int& end) const {
    const DealtShare& share = state().share;
    const int window_blocks = div_up(window_end - window_begin, 64), entry_block = begin / 64;
    const int blocks = window_blocks + (begin < end ? div_up(end, 64) - entry_block : 0);
    const bool head = part == kItemHead;
    const int cut = blocks_before_cut(blocks, head ? share.head_share : share.tail_share,
                                      static_cast<int>(gridDim.x));
    const int cut_place = window_begin + cut * 64,
              cut_entry = (entry_block + cut - window_blocks) * 64;
    if (head) {
      window_end = min(window_end, cut_place);
      end = min(end, cut_entry);
    } else {
      window_begin = cut_place;
      begin = max(begin, cut_entry);
    }
    if (window_begin >= window_end) window_begin = window_end = 0;
  }

  // coming.item where blocks are dealt out: the item, and above it the part.
  static constexpr int kItemShift = 28, kItemBits = (1 << kItemShift) - 1;
};

}  // namespace dsv4::nvidia::sm90_attend
