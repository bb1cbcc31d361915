// The loader role of sm90_attend: walks this CTA's items block by block, gathers their rows and
// writes them as bf16 into the tile of a stage. Four warps; each owns 8 rows of either half of a
// block and walks on its own, so that nothing is handed over inside the role.
#pragma once
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/cluster.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/attend_sm90.h"
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
  __device__ __forceinline__ bool valid() const { return bits != 0; }
  __device__ __forceinline__ const std::byte* values() const {
    return reinterpret_cast<const std::byte*>(bits >> 19 << 3);
  }
  __device__ __forceinline__ int to_scales() const {
    return static_cast<int>(static_cast<uint32_t>(bits) << 13 >> 10);
  }
};

/// Phase parity of a barrier that serves every kEvery-th block.
template <int kEvery>
__device__ __forceinline__ uint32_t phase_of(int block) {
  return static_cast<uint32_t>(block / kEvery) & 1;
}

/// By one thread.
template <typename Traits>
__device__ __forceinline__ void init_barriers(Barriers<Traits>& barriers, int rows_empty_arrivals,
                                              int p_empty_arrivals) {
  for (int i = 0; i < Traits::kStages; ++i) {
    mbarrier_init(shared_address(&barriers.rows_full[i]), 128);
    mbarrier_init(shared_address(&barriers.rows_empty[i]), rows_empty_arrivals);
  }
  for (uint64_t& known : barriers.blocks_known) {
    mbarrier_init(shared_address(&known), Traits::kCtas == 2 ? 32 : 128);
  }
  mbarrier_init(shared_address(&barriers.places_known), 128);
  mbarrier_init(shared_address(&barriers.p_full), 128);
  mbarrier_init(shared_address(&barriers.p_empty), p_empty_arrivals);
}

/// The blocks of this CTA's items in order: `fetch` reads where the rows of the next block lie, the
/// `resolve` after it turns that into addresses. Items lie chain by chain, so that chains that most
/// tokens lack come last; lanes look at 32 items at once and pass over those without rows.
///
/// A CTA alone: runs in the warps of an output role, which have time but no registers, so that all
/// is kept in shared memory between calls. Warp w finds the rows of loader warp w, 16 of a block.
/// In a pair: one warp with nothing else to do finds all 32 rows; its state stays in registers.
template <typename Traits>
struct BlockWalk {
  static constexpr bool kOneWarp = Traits::kCtas == 2;
  const AttendSm90Args& args;
  WalkStorage<Traits>& shared;
  WalkState* own = nullptr;  // with one warp

  /// Asks for the first item.
  __device__ __forceinline__ void start() const {
    if (writes()) {
      state() = {};
      state().next_items = static_cast<int>(blockIdx.x) / Traits::kCtas;
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
      } else if (!kOneWarp) {
        copy_async_wait<0>();
        mbarrier_arrive(shared_address(&barriers.places_known));
      }
      known = end;
    }
  }
  /// In a pair, for every block.
  __device__ __forceinline__ void step(int block) const {
    find_addresses(block);
    fetch(block + Traits::kBlocksAhead + Traits::kBlocksFetched);
  }
  /// In a CTA alone two roles share the work. For every block, by the one that walks, which waits
  /// for what it has asked for before it gives back P of that block.
  __device__ __forceinline__ void find_places(int block) const {
    fetch(block + Traits::kBlocksAhead + Traits::kBlocksFetched);
  }
  /// By the other one, when it has P of that block.
  __device__ __forceinline__ void find_addresses(int block) const {
    resolve((block + Traits::kBlocksAhead) % Traits::kAddressSlots);
  }

 private:
  __device__ __forceinline__ WalkState& state() const {
    if constexpr (kOneWarp) {
      return *own;
    } else {
      return shared.states[thread_of_role() >> 5];
    }
  }
  /// Filled asynchronously, and so always in shared memory.
  __device__ __forceinline__ ComingItem& coming() const {
    return shared.states[thread_of_role() >> 5].coming;
  }
  /// Who changes the state: lane 0 that of its warp, or every lane its copy.
  __device__ __forceinline__ bool writes() const {
    return kOneWarp || (thread_of_role() & 31) == 0;
  }
  /// Whether a lane has a row.
  __device__ __forceinline__ bool has_row() const {
    return kOneWarp || (thread_of_role() & 31) < 16;
  }
  __device__ __forceinline__ int row_of_block() const {
    const int warp = thread_of_role() >> 5, lane = thread_of_role() & 31;
    return kOneWarp ? static_cast<int>(cluster_rank()) * 32 + lane
                    : (lane >> 3 & 1) * 32 + warp * 8 + (lane & 7);
  }
  __device__ __forceinline__ uint32_t address_of_row(int slot) const {
    const int warp = thread_of_role() >> 5, lane = thread_of_role() & 31;
    return shared_address(kOneWarp ? &shared.addresses[lane >> 3][slot][lane & 7]
                                   : &shared.addresses[warp][slot][lane]);
  }

  /// Asks for the places of block `block_idx`, one more than in the last call. Past the end: a
  /// header with token -1, rows that are all masked.
  __device__ __forceinline__ void fetch(int block_idx) const {
    WalkState& state = this->state();
    uint32_t flags = state.inside != 0 ? 0 : kFirstBlock;
    if (state.inside == 0) start_item(state);
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
    if (!more) flags |= kLastBlock;
    __syncwarp();
    if (has_row()) {
      const uint32_t place = address_of_row(block_idx % Traits::kAddressSlots);
      copy_async_4(place, from, offset >= 0 ? 4 : 0);
      store_shared(place + 4, static_cast<uint32_t>(offset));
    }
    if (writes()) {
      if (thread_of_role() == 0) {
        if (state.only_chain != 0) flags |= kOnlyChain;
        store_shared_2(shared_address(&shared.headers[block_idx % Traits::kHeaderSlots]),
                       static_cast<uint32_t>(token), state.tile | state.chain << 8 | flags << 24);
      }
      state.inside = more;
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
      const std::byte* page = rows.base + block * rows.block_stride_bytes;
      const int to_scales =
          rows.rows_per_block * Traits::kRowBytes - offset * (Traits::kRowBytes - 8);
      uint64_t bits = RowAddress::of(page + static_cast<uint32_t>(offset * Traits::kRowBytes),
                                     Traits::kHasScales ? to_scales : 0)
                          .bits;
      if (masked) bits = 0;
      store_shared_2(at, static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32));
    }
  }

  // tagged: row within its page, or kListRow; kCompressedRow tells the source; kNoRow: masked
  static constexpr int kNoRow = -1;
  static constexpr int kCompressedRow = 1 << 30;
  static constexpr int kListRow = kCompressedRow - 1;

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
      const int chain = exists ? chain_of(coming.item) : 0;
      const int rest = coming.item - chain * args.chain_items.divisor;
      const int token = exists ? rest >> args.log2_tiles : -1;
      int window_begin = coming.window_begin, window_end = coming.window_end;
      if (!exists || chain > 0 || window_begin >= window_end) window_begin = window_end = 0;
      int begin = coming.entry_begin, end = coming.entry_end;
      const bool only = clip_to_chain(chain, begin, end);
      if (!exists) begin = end = 0;
      state.token = token;
      state.seq = coming.seq;
      state.entry_begin = begin;
      state.entry_end = end;
      state.chain = static_cast<uint32_t>(chain);
      state.tile = static_cast<uint32_t>(rest - (token << args.log2_tiles));
      state.only_chain = only;
      if (!kOneWarp && exists) {
        const int first = (thread_of_role() >> 5) * 256;
        const int head = static_cast<int>(state.tile) * 64;
        prefetch_box(args.q_map, first, head, token);
        prefetch_box(args.q_map, first + 128, head, token);
      }
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
    const int stride = static_cast<int>(gridDim.x) / Traits::kCtas;
    uint32_t pending = state.pending;
    int next_items = state.next_items;
    __syncwarp();
    while (pending == 0 && next_items < args.num_items) {
      pending = __ballot_sync(~0u, has_work(next_items + lane * stride));
      next_items += 32 * stride;
    }
    const int item = pending == 0 ? -1 : next_items + (__ffs(pending) - 33) * stride;
    if (writes()) {
      state.next_items = next_items;
      state.pending = pending & (pending - 1);
    }
    if (lane == 0) coming().item = item;
    if (lane < 5) {
      const AttendArgs& attend = args.attend;
      const int32_t* from = attend.token_to_seq;
      if (lane == 1) from = attend.window.begin;
      if (lane == 2) from = attend.window.end;
      if (lane == 3) from = attend.compressed.begin;
      if (lane == 4) from = attend.compressed.end;
      const bool valid = item >= 0 && from != nullptr;  // null: lists begin at 0, no rows end there
      int token = 0;
      if (valid) {
        token = (item - chain_of(item) * args.chain_items.divisor) >> args.log2_tiles;
      }
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
};

// ---- E4M3 to bf16

/// 2^(120 + e) in both halves: undoes the bias that the codes have as bf16 bits and scales, in one
/// product. Exact for scale bytes up to kLargestFastScale; beyond, see convert_exactly.
constexpr uint32_t kLargestFastScale = 134;
__device__ __forceinline__ uint32_t scale_operand(uint32_t byte) {
  return min(byte + 120u, 254u) * 0x00800080u;
}
/// Bits 7, 15, 23, 31 of the result: whether those bytes exceed kLargestFastScale.
__device__ __forceinline__ uint32_t slow_scales(uint32_t bytes) {
  return bytes & ((bytes & 0x7f7f7f7fu) + 0x01010101u * (127 - (kLargestFastScale - 128)));
}
/// Likewise: whether those E4M3 codes are NaN.
__device__ __forceinline__ uint32_t nan_codes(uint32_t codes) {
  return (codes & 0x7f7f7f7fu) + 0x01010101u;
}
/// Four codes as two pairs of bf16. Sign-extended to 16 bits and moved up by 4, a code has its sign
/// in bit 15 and the rest in bits 4-10, where it reads as the value times 2^-120.
__device__ __forceinline__ void convert_4(uint32_t codes, uint32_t scale, uint32_t& low,
                                          uint32_t& high) {
  constexpr uint32_t kBits = 0x87f087f0u;
  low = multiply_bf16x2(permute_bytes<0x9180>(codes) << 4 & kBits, scale);
  high = multiply_bf16x2(permute_bytes<0xb3a2>(codes) << 4 & kBits, scale);
}

/// A thread's share of a pass: 16-byte chunk `chunk` of every 64 of row `row`.
template <typename Traits>
struct PassAddresses {
  uint32_t raw;           // of the row in its slot, at this chunk
  uint32_t scales;        // 8 bytes
  uint32_t unit0, unit1;  // where values 0-7 and 8-15 of panel 0 go

  /// Where values 8 `upper`... of panel i go.
  __device__ __forceinline__ uint32_t unit(int i, int upper) const {
    return (upper != 0 ? unit1 : unit0) + i * Traits::kPanelBytes;
  }
};

/// NaN codes and scales of 2^8 and more, one word at a time through f32 and rounded once. Rare: the
/// fast path has written the tile before, this overwrites it.
template <typename Traits, typename Addresses>
__device__ __forceinline__ void convert_exactly(const Addresses& at) {
#pragma unroll 1
  for (int i = 0; i < Traits::kFp8Columns / 16; ++i) {
    const int panel = i >> 2, word = i & 3;
    float scale = 1.f;
    if (Traits::kHasScales) {
      const uint32_t byte = load_shared(at.scales + (panel & 4)) >> (panel & 3) * 8 & 0xff;
      const uint32_t bits = byte == 0 ? 0x00400000u : byte == 255 ? 0x7fffffffu : byte << 23;
      scale = __uint_as_float(bits);
    }
    const uint32_t codes = load_shared(at.raw + panel * 64 + word * 4);
    uint32_t packed[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t halves = e4m3x2_to_f16x2(static_cast<uint16_t>(codes >> 16 * k));
      const __half2 pair = *reinterpret_cast<const __half2*>(&halves);
      packed[k] = pack_bf16x2(__low2float(pair) * scale, __high2float(pair) * scale);
    }
    store_shared_2(at.unit(panel, word >> 1) + (word & 1) * 8, packed[0], packed[1]);
  }
}

/// Copies 8 rows of a warp (one a quad) into a slot of the raw ring; masked rows become zeros.
/// `wide`: rows lie at multiples of 16; else, where pages hold an odd number of rows, of 8.
template <typename Traits>
__device__ __forceinline__ void gather_raw(RowAddress address, bool wide, uint32_t slot, int row,
                                           int chunk) {
  const bool valid = address.valid();
  const std::byte* from = address.values() + chunk * 16;
  asm volatile("" : "+l"(from));  // one address register, immediate offsets
  const uint32_t to = slot + row * Traits::kRawRowBytes + chunk * 16;
  if (Traits::kHasScales && chunk == 0) {
    copy_async_8(slot + 8 * Traits::kRawRowBytes + row * 8, from + address.to_scales(),
                 valid ? 8 : 0);
  }
  if (wide || !Traits::kHasScales) {
#pragma unroll
    for (int i = 0; i < Traits::kRowBytes / 64; ++i)
      copy_async_stream(to + i * 64, from + i * 64, valid ? 16 : 0);
  } else {  // a loop, so that the others branch around it
#pragma unroll 1
    for (int i = 0; i < Traits::kRowBytes / 64; ++i) {
      copy_async_8(to + i * 64, from + i * 64, valid ? 8 : 0);
      copy_async_8(to + i * 64 + 8, from + i * 64 + 8, valid ? 8 : 0);
    }
  }
  copy_async_commit();
}

/// Converts the 8 rows of a warp that lie in a raw slot into the tile.
template <typename Traits, typename Addresses>
__device__ __forceinline__ void convert_pass(const Addresses& at, uint32_t rope_unit, int odd) {
  uint2 scales = {0x7f7f7f7fu, 0x7f7f7f7fu};
  if (Traits::kHasScales) scales = load_shared_2(at.scales);
  constexpr int kFp8Panels = Traits::kFp8Columns / 64;
  uint4 raw[kFp8Panels], rope[2];
#pragma unroll
  for (int i = 0; i < kFp8Panels; ++i) raw[i] = load_shared_16(at.raw + i * 64);
  uint32_t unusual = slow_scales(scales.x) | slow_scales(scales.y);
#pragma unroll
  for (int i = 0; i < kFp8Panels; ++i) {
    if (Traits::kHasScales && i == 4) {  // odd rows take the upper half first: no bank conflict
      rope[0] = load_shared_16(at.raw + 448 + odd * 64);
      rope[1] = load_shared_16(at.raw + 512 - odd * 64);
    }
    const uint32_t bytes = i < 4 ? scales.x : scales.y;
    const uint32_t scale = scale_operand(__byte_perm(bytes, 0, 0x4440 | (i & 3)));
    uint32_t y[8];
    convert_4(raw[i].x, scale, y[0], y[1]);
    convert_4(raw[i].y, scale, y[2], y[3]);
    store_shared_4(at.unit(i, 0), y[0], y[1], y[2], y[3]);
    convert_4(raw[i].z, scale, y[4], y[5]);
    convert_4(raw[i].w, scale, y[6], y[7]);
    store_shared_4(at.unit(i, 1), y[4], y[5], y[6], y[7]);
    unusual |=
        nan_codes(raw[i].x) | nan_codes(raw[i].y) | nan_codes(raw[i].z) | nan_codes(raw[i].w);
  }
  if (Traits::kHasScales) {
    store_shared_4(rope_unit, rope[0].x, rope[0].y, rope[0].z, rope[0].w);
    store_shared_4(rope_unit ^ 64, rope[1].x, rope[1].y, rope[1].z, rope[1].w);
  }
  if (__any_sync(~0u, (unusual & 0x80808080u) != 0)) convert_exactly<Traits>(at);
}

/// What a thread holds of a pass before its turn comes: panels 0-3 and the scales.
struct RawFront {
  uint4 panels[4];
  uint2 scales = {0x7f7f7f7fu, 0x7f7f7f7fu};

  template <typename Traits>
  __device__ __forceinline__ void load(uint32_t raw, uint32_t scales_at) {
    if (Traits::kHasScales) scales = load_shared_2(scales_at);
#pragma unroll
    for (int i = 0; i < 4; ++i) panels[i] = load_shared_16(raw + i * 64);
  }
};

/// One panel of a pass: 16 codes a thread.
template <typename Addresses>
__device__ __forceinline__ void convert_panel(const Addresses& at, int i, const uint4& raw,
                                              uint32_t scales) {
  const uint32_t scale = scale_operand(__byte_perm(scales, 0, 0x4440 | (i & 3)));
  uint32_t y[8];
  convert_4(raw.x, scale, y[0], y[1]);
  convert_4(raw.y, scale, y[2], y[3]);
  store_shared_4(at.unit(i, 0), y[0], y[1], y[2], y[3]);
  convert_4(raw.z, scale, y[4], y[5]);
  convert_4(raw.w, scale, y[6], y[7]);
  store_shared_4(at.unit(i, 1), y[4], y[5], y[6], y[7]);
}
__device__ __forceinline__ uint32_t nan_codes(const uint4& raw) {
  return nan_codes(raw.x) | nan_codes(raw.y) | nan_codes(raw.z) | nan_codes(raw.w);
}

/// FP8 rows, in passes of half a block, which are handed over one by one. Rows are gathered three
/// passes ahead into the raw ring, new ones when a block has been handed over: until then others
/// wait for this role. What a pass reads from shared memory is asked for half a pass earlier: there
/// is one warp per scheduler, and nobody else to fill the time.
template <typename Traits>
__device__ __forceinline__ void load_and_convert(const AttendSm90Args& args,
                                                 SharedStorage<Traits>& shared, int warp,
                                                 int lane) {
  constexpr int kFp8Panels = Traits::kFp8Columns / 64;
  const int row = lane >> 2, chunk = lane & 3, odd = row & 1;
  const int tile_row = warp * 8 + row;  // + 32 in the second pass
  const uint32_t unit0 = shared_address(shared.rows) + tile_row * 128 + ((2 * chunk ^ row) << 4);
  const uint32_t rope_unit = shared_address(shared.rows) + tile_row * 128 +
                             (((chunk + 4 * odd) ^ row) << 4) + 7 * Traits::kPanelBytes;
  const uint32_t raw = shared_address(shared.raw[warp]);
  const uint32_t addresses = shared_address(shared.walk.addresses[warp]) + row * 8;
  const auto address = [&](int slot, int half) {
    const uint2 bits = load_shared_2(addresses + (slot * 16 + half * 8) * 8);
    return RowAddress{static_cast<uint64_t>(bits.y) << 32 | bits.x};
  };
  const uint32_t own = raw + row * Traits::kRawRowBytes + chunk * 16;
  const uint32_t own_scales = raw + 8 * Traits::kRawRowBytes + row * 8;
  uint32_t masks[3] = {};  // of this pass and the two after it
  const auto gather = [&](RowAddress found, uint32_t slot) {
    gather_raw<Traits>(found, args.wide_rows, slot, row, chunk);
    masks[0] = masks[1];
    masks[1] = masks[2];
    masks[2] = __ballot_sync(~0u, found.valid());
  };

  mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
#pragma unroll 1
  for (int i = 0; i < 3; ++i) gather(address(i >> 1, i & 1), raw + i * Traits::kRawSlotBytes);
  int token = shared.walk.headers[0].token;
  mbarrier_poll(shared_address(&shared.barriers.blocks_known[1]), 0);

  uint32_t slot = 0;  // offset of this pass's
  int ahead = 1;      // slot of the addresses of the pass after the next two
  copy_async_wait<2>();
  __syncwarp();
  RawFront front;
  front.load<Traits>(own, own_scales);
#pragma unroll 1
  for (int pass = 0; token >= 0; ++pass) {
    const int half = pass & 1, stage = pass >> 1 & 1;
    if (half == 0 && pass > 3) {
      mbarrier_poll(shared_address(&shared.barriers.rows_empty[stage]), phase_of<4>(pass) ^ 1);
    }
    const uint32_t tile = stage * (Traits::kPanels * Traits::kPanelBytes) + half * 32 * 128;
    const PassAddresses<Traits> at = {own + slot, own_scales + slot, unit0 + tile,
                                      (unit0 ^ 16) + tile};
    uint4 back[kFp8Panels - 4];
#pragma unroll
    for (int i = 4; i < kFp8Panels; ++i) back[i - 4] = load_shared_16(at.raw + i * 64);
    if (lane == 0) {
      shared.mask[stage][half * 4 + warp] = masks[0];
    }

    uint32_t unusual = slow_scales(front.scales.x) | slow_scales(front.scales.y);
    uint4 rope[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      convert_panel(at, i, front.panels[i], front.scales.x);
      unusual |= nan_codes(front.panels[i]);
      if (Traits::kHasScales) {  // odd rows take the upper half first: no bank conflict
        if (i == 1) rope[0] = load_shared_16(at.raw + 448 + odd * 64);
        if (i == 2) rope[1] = load_shared_16(at.raw + 512 - odd * 64);
        if (i == 3) {
          uint32_t to = rope_unit + tile;
          asm volatile("" : "+r"(to));  // the other address is not worth a register
          store_shared_16(to, rope[0]);
          store_shared_16(to ^ 64, rope[1]);
        }
      }
    }
    const uint32_t back_scales = front.scales.y;
    constexpr uint32_t kLastSlot = (Traits::kRawSlots - 1) * Traits::kRawSlotBytes;
    const uint32_t next_slot = slot == kLastSlot ? 0 : slot + Traits::kRawSlotBytes;
    copy_async_wait<1>();
    __syncwarp();
    front.load<Traits>(own + next_slot, own_scales + next_slot);
#pragma unroll
    for (int i = 4; i < kFp8Panels; ++i) {
      convert_panel(at, i, back[i - 4], back_scales);
      unusual |= nan_codes(back[i - 4]);
    }
    if (__any_sync(~0u, (unusual & 0x80808080u) != 0)) convert_exactly<Traits>(at);
    if (half == 1) {
      fence_proxy_async();
      mbarrier_arrive(shared_address(&shared.barriers.rows_full[stage]));
    }

    // The slot has been read.
    __syncwarp();
    gather(address(ahead, half ^ 1), raw + slot);
    if (half == 0) ahead = ahead == Traits::kAddressSlots - 1 ? 0 : ahead + 1;
    slot = next_slot;
    if (half == 1) {
      token = shared.walk.headers[((pass >> 1) + 1) % Traits::kHeaderSlots].token;
    }
  }
}

/// bf16 rows: copied straight into the tile as soon as its stage is free; meanwhile those of the
/// next block are fetched into L2.
template <typename Traits>
__device__ __forceinline__ void load_bf16(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                          int warp, int lane) {
  const int row = lane >> 2, chunk = lane & 3;
  const uint32_t tile_row = shared_address(shared.rows) + (warp * 8 + row) * 128;
  const uint32_t addresses = shared_address(shared.walk.addresses[warp]) + row * 8;
  const auto address = [&](int slot, int pass) {
    const uint2 bits = load_shared_2(addresses + (slot * 16 + pass * 8) * 8);
    return RowAddress{static_cast<uint64_t>(bits.y) << 32 | bits.x};
  };

  mbarrier_poll(shared_address(&shared.barriers.blocks_known[1]), 0);
  int here = 0;
  for (int block = 0; shared.walk.headers[block % Traits::kHeaderSlots].token >= 0; ++block) {
    const int stage = block & 1;
    const int next = here == Traits::kAddressSlots - 1 ? 0 : here + 1;
    if (block > 1) {
      mbarrier_poll(shared_address(&shared.barriers.rows_empty[stage]), phase_of<2>(block) ^ 1);
    }
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const RowAddress found = address(here, pass);
      const bool valid = found.valid();
      const uint32_t mask = __ballot_sync(~0u, valid);
      if (lane == 0) shared.mask[stage][pass * 4 + warp] = mask;
      const std::byte* from = found.values() + chunk * 16;
      asm volatile("" : "+l"(from));  // one address register, immediate offsets
      const uint32_t to =
          tile_row + stage * (Traits::kPanels * Traits::kPanelBytes) + pass * 32 * 128;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        copy_async_stream(
            to + (i >> 1) * Traits::kPanelBytes + ((((i & 1) * 4 + chunk) ^ row) << 4),
            from + i * 64, valid ? 16 : 0);
      }
    }
    copy_async_commit();
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const RowAddress coming = address(next, pass);
      if (coming.valid()) {
        prefetch_l2(coming.values() + chunk * 256);
        prefetch_l2(coming.values() + chunk * 256 + 128);
      }
    }
    here = next;
    copy_async_wait<0>();
    __syncwarp();
    fence_proxy_async();
    mbarrier_arrive(shared_address(&shared.barriers.rows_full[stage]));
  }
}

}  // namespace dsv4::nvidia::sm90_attend
