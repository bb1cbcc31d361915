// The loader role of sm90_attend: walks this CTA's items block by block, gathers their rows and
// writes them as bf16 into the tile of a stage. Four warps; each owns 8 rows of either half of a
// block and walks on its own, so that nothing is handed over inside the role.
#pragma once
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/attend_sm90.h"
#include "backends/nvidia/ops/attend_sm90_traits.h"

namespace dsv4::nvidia::sm90_attend {

using namespace sm90;  // NOLINT: kernel code, not included by others

/// A row of a block for the lanes that copy it; 16 bytes in shared memory.
struct RowAddress {
  const std::byte* values;  // null: masked
  int32_t scales;           // from `values` to the row's scale bytes
};

/// The blocks of this CTA's items in order, for one warp: `fetch` reads where the warp's 16 rows of
/// the next block lie, the `resolve` after it turns that into addresses. Items lie chain by chain,
/// so that chains that most tokens lack come last; lanes look at 32 items at once and pass over
/// those without rows.
template <typename Traits>
class BlockWalk {
 public:
  __device__ __forceinline__ BlockWalk(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                       int warp, int lane)
      : args_(args),
        shared_(shared),
        warp_(warp),
        lane_(lane),
        row_in_block_((lane >> 3 & 1) * 32 + warp * 8 + (lane & 7)) {}

  /// Past the end: a header with token -1 and rows that are all masked.
  __device__ __forceinline__ void fetch() {
    uint32_t flags = 0;
    if (!inside_) {
      start_item();
      flags = kFirstBlock;
    }
    const int row = first_ + row_in_block_;
    const bool valid = row >= begin_ && row < end_;
    is_compressed_ = compressed_;
    const RowSource& rows = compressed_ ? args_.attend.compressed : args_.attend.window;
    int place = row;
    offset_ = kListRow;
    if (rows.kind == RowSource::kRange) {
      const FastDivisor& by_rows = compressed_ ? args_.compressed_rows : args_.window_rows;
      const FastDivisor& by_columns = compressed_ ? args_.compressed_columns : args_.window_columns;
      const int block = by_rows.divide(row);
      offset_ = row - block * by_rows.divisor;
      place = block - by_columns.divide(block) * by_columns.divisor;
    }
    value_ = -1;
    if (valid) value_ = __ldg(places_ + place);

    first_ += 64;
    if (first_ >= end_) {
      inside_ = !compressed_ && entry_end_ > 0;
      if (inside_) start_source(true, entry_begin_, entry_end_);
    }
    if (!inside_) flags |= kLastBlock;
    if (warp_ == 0 && lane_ == 0) {
      store_shared_4(shared_address(&shared_.headers[header_slot_]), static_cast<uint32_t>(token_),
                     info_ & 0xff, info_ >> 8 & 0xffff, flags | info_ >> 24);
    }
    header_slot_ = (header_slot_ + 1) % Traits::kHeaderSlots;
  }

  /// Of the block fetched last.
  __device__ __forceinline__ void resolve() {
    const RowSource& rows = is_compressed_ ? args_.attend.compressed : args_.attend.window;
    int block = value_, offset = offset_;
    if (offset == kListRow) {
      const FastDivisor& by_rows = is_compressed_ ? args_.compressed_rows : args_.window_rows;
      block = by_rows.divide(value_);
      offset = value_ - block * by_rows.divisor;
    }
    uint64_t values = reinterpret_cast<uint64_t>(rows.base + block * rows.block_stride_bytes) +
                      static_cast<uint32_t>(offset * Traits::kRowBytes);
    if (value_ < 0) values = 0;
    const int scales = rows.rows_per_block * Traits::kRowBytes - offset * (Traits::kRowBytes - 8);
    if (lane_ < 16) {
      store_shared_4(shared_address(&shared_.addresses[warp_][address_slot_][lane_]),
                     static_cast<uint32_t>(values), static_cast<uint32_t>(values >> 32),
                     static_cast<uint32_t>(scales), 0);
    }
    address_slot_ = address_slot_ == Traits::kAddressSlots - 1 ? 0 : address_slot_ + 1;
  }

 private:
  static constexpr int kListRow = -1;

  __device__ __forceinline__ void start_source(bool compressed, int begin, int end) {
    compressed_ = compressed;
    begin_ = begin;
    end_ = end;
    first_ = begin_ & ~63;
    const RowSource& rows = compressed ? args_.attend.compressed : args_.attend.window;
    places_ = rows.kind == RowSource::kList ? rows.slots + token_ * rows.slots_stride
                                            : rows.table + seq_ * rows.table_stride;
  }

  __device__ __forceinline__ void start_item() {
    while (pending_ == 0 && group_ < args_.num_items) look_at_items();
    if (pending_ == 0) {
      token_ = -1;
      begin_ = end_ = entry_end_ = 0;
      return;
    }
    const int from = __ffs(pending_) - 1;
    pending_ &= pending_ - 1;
    const int item = group_ + (from - 32) * static_cast<int>(gridDim.x);
    const AttendArgs& attend = args_.attend;
    const int chain = chain_of(item);
    const int rest = item - chain * (attend.num_tokens << args_.log2_tiles);
    token_ = rest >> args_.log2_tiles;
    seq_ = attend.token_to_seq != nullptr ? __ldg(attend.token_to_seq + token_) : 0;
    const bool only = entries_of(token_, chain, entry_begin_, entry_end_);
    int window_begin = 0, window_end = 0;
    if (chain == 0) rows_of(attend.window, token_, window_begin, window_end);
    info_ = (rest - (token_ << args_.log2_tiles)) | chain << 8 | (only ? kOnlyChain << 24 : 0);
    inside_ = true;
    if (window_begin < window_end) {
      start_source(false, window_begin, window_end);
    } else {
      start_source(true, entry_begin_, entry_end_);
    }
  }

  // Lane l looks at the l-th of this CTA's next 32 items.
  __device__ __forceinline__ void look_at_items() {
    const int item = group_ + lane_ * static_cast<int>(gridDim.x);
    group_ += 32 * static_cast<int>(gridDim.x);
    bool work = false;
    if (item < args_.num_items) {
      const int chain = chain_of(item);
      const int token =
          (item - chain * (args_.attend.num_tokens << args_.log2_tiles)) >> args_.log2_tiles;
      int begin = 0, end = 0;
      if (chain > 0) entries_of(token, chain, begin, end);
      work = chain == 0 || begin < end;
    }
    pending_ = __ballot_sync(~0u, work);
  }

  __device__ __forceinline__ int chain_of(int item) const {
    return args_.attend.max_chains == 1 ? 0 : item / (args_.attend.num_tokens << args_.log2_tiles);
  }
  __device__ __forceinline__ static void rows_of(const RowSource& rows, int token, int& begin,
                                                 int& end) {
    begin = rows.kind == RowSource::kRange ? __ldg(rows.begin + token) : 0;
    end = rows.kind == RowSource::kNone ? 0 : __ldg(rows.end + token);
    if (begin >= end) begin = end = 0;
  }
  // Entries of a chain; true where it is the token's only one.
  __device__ __forceinline__ bool entries_of(int token, int chain, int& begin, int& end) const {
    rows_of(args_.attend.compressed, token, begin, end);
    const int chain_rows = args_.attend.blocks_per_chain * 64;
    const bool only = end <= chain_rows;
    begin = max(begin, chain * chain_rows);
    end = min(end, (chain + 1) * chain_rows);
    if (begin >= end) begin = end = 0;
    return only;
  }

  const AttendSm90Args& args_;
  SharedStorage<Traits>& shared_;
  const int warp_, lane_, row_in_block_;
  int group_ = static_cast<int>(blockIdx.x);  // first item that no lane has looked at
  uint32_t pending_ = 0;                      // of the 32 before it: those that wait
  // Current item
  bool inside_ = false;
  int token_ = -1, seq_ = 0, info_ = 0;
  int entry_begin_ = 0, entry_end_ = 0;
  // Its current source
  bool compressed_ = false;
  const int32_t* places_ = nullptr;
  int first_ = 0, begin_ = 0, end_ = 0;
  // Block fetched last: this lane's row
  bool is_compressed_ = false;
  int value_ = -1, offset_ = 0;
  int header_slot_ = 0, address_slot_ = 0;
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
/// Four codes as two pairs of bf16. The sign moves to bit 15 and the rest to bits 4-10, where it
/// reads as the value times 2^-120: x << 4, plus the sign bit (7 -> 11) times 15 = 8 + 4 + 2 + 1.
__device__ __forceinline__ void convert_4(uint32_t codes, uint32_t scale, uint32_t& low,
                                          uint32_t& high) {
  const uint32_t x0 = __byte_perm(codes, 0, 0x4140), x1 = __byte_perm(codes, 0, 0x4342);
  low = multiply_bf16x2(multiply_add(x0 & 0x00800080u, 240, x0 << 4), scale);
  high = multiply_bf16x2(multiply_add(x1 & 0x00800080u, 240, x1 << 4), scale);
}

/// A thread's share of a pass: 16-byte chunk `chunk` of every 64 of row `row`.
template <typename Traits>
struct PassAddresses {
  uint32_t raw;           // of the row in its slot, at this chunk
  uint32_t scales;        // 8 bytes
  uint32_t unit0, unit1;  // where values 0-7 and 8-15 of panel 0 go
};

/// NaN codes and scales of 2^8 and more, one word at a time through f32 and rounded once. Rare: the
/// fast path has written the tile before, this overwrites it.
template <typename Traits>
__device__ __forceinline__ void convert_exactly(const PassAddresses<Traits>& at) {
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
      packed[k] = pack_bf16(__low2float(pair) * scale, __high2float(pair) * scale);
    }
    store_shared_2((word < 2 ? at.unit0 : at.unit1) + panel * Traits::kPanelBytes + (word & 1) * 8,
                   packed[0], packed[1]);
  }
}

/// Copies 8 rows of a warp (one a quad) into a slot of the raw ring; masked rows become zeros.
template <typename Traits>
__device__ __forceinline__ void gather_raw(uint4 address, uint32_t slot, int row, int chunk) {
  const uint64_t values = static_cast<uint64_t>(address.y) << 32 | address.x;
  const bool valid = values != 0;
  const std::byte* from = reinterpret_cast<const std::byte*>(values) + chunk * 16;
  asm volatile("" : "+l"(from));  // one address register, immediate offsets
  const uint32_t to = slot + row * Traits::kRawRowBytes + chunk * 16;
  if (Traits::kHasScales && chunk == 0) {
    copy_async_8(slot + 8 * Traits::kRawRowBytes + row * 8, from + static_cast<int>(address.z),
                 valid);
  }
#pragma unroll
  for (int i = 0; i < Traits::kRowBytes / 64; ++i) copy_async_16(to + i * 64, from + i * 64, valid);
  copy_async_commit();
}

/// Converts the 8 rows of a warp that lie in a raw slot into the tile.
template <typename Traits>
__device__ __forceinline__ void convert_pass(const PassAddresses<Traits>& at, uint32_t rope_unit,
                                             int odd) {
  uint2 scales = {0x7f7f7f7fu, 0x7f7f7f7fu};
  if (Traits::kHasScales) scales = load_shared_2(at.scales);
  constexpr int kFp8Panels = Traits::kFp8Columns / 64;
  uint4 raw[kFp8Panels], rope[2];
#pragma unroll
  for (int i = 0; i < kFp8Panels; ++i) raw[i] = load_shared_4(at.raw + i * 64);
  uint32_t unusual = slow_scales(scales.x) | slow_scales(scales.y);
#pragma unroll
  for (int i = 0; i < kFp8Panels; ++i) {
    if (Traits::kHasScales && i == 4) {  // odd rows take the upper half first: no bank conflict
      rope[0] = load_shared_4(at.raw + 448 + odd * 64);
      rope[1] = load_shared_4(at.raw + 512 - odd * 64);
    }
    const uint32_t bytes = i < 4 ? scales.x : scales.y;
    const uint32_t scale = scale_operand(__byte_perm(bytes, 0, 0x4440 | (i & 3)));
    uint32_t y[8];
    convert_4(raw[i].x, scale, y[0], y[1]);
    convert_4(raw[i].y, scale, y[2], y[3]);
    store_shared_4(at.unit0 + i * Traits::kPanelBytes, y[0], y[1], y[2], y[3]);
    convert_4(raw[i].z, scale, y[4], y[5]);
    convert_4(raw[i].w, scale, y[6], y[7]);
    store_shared_4(at.unit1 + i * Traits::kPanelBytes, y[4], y[5], y[6], y[7]);
    unusual |=
        nan_codes(raw[i].x) | nan_codes(raw[i].y) | nan_codes(raw[i].z) | nan_codes(raw[i].w);
  }
  if (Traits::kHasScales) {
    store_shared_4(rope_unit, rope[0].x, rope[0].y, rope[0].z, rope[0].w);
    store_shared_4(rope_unit ^ 64, rope[1].x, rope[1].y, rope[1].z, rope[1].w);
  }
  if (__any_sync(~0u, (unusual & 0x80808080u) != 0)) convert_exactly<Traits>(at);
}

/// FP8 rows: gathered three passes (half blocks) ahead into the raw ring, then converted.
template <typename Traits>
__device__ __forceinline__ void load_and_convert(const AttendSm90Args& args,
                                                 SharedStorage<Traits>& shared, int warp,
                                                 int lane) {
  const int row = lane >> 2, chunk = lane & 3, odd = row & 1;
  const int tile_row = warp * 8 + row;  // + 32 in the second pass
  const uint32_t unit0 = shared_address(shared.rows) + tile_row * 128 + ((2 * chunk ^ row) << 4);
  const uint32_t rope_unit = shared_address(shared.rows) + tile_row * 128 +
                             (((chunk + 4 * odd) ^ row) << 4) + 7 * Traits::kPanelBytes;
  const uint32_t raw = shared_address(shared.raw[warp]);
  const uint32_t addresses = shared_address(shared.addresses[warp]) + row * 16;
  const auto address = [&](int slot, int pass) {
    return load_shared_4(addresses + (slot * 16 + pass * 8) * 16);
  };

  BlockWalk<Traits> walk(args, shared, warp, lane);
  for (int i = 0; i < 2; ++i) {
    walk.fetch();
    walk.resolve();
  }
  walk.fetch();
  __syncwarp();
  barrier_arrive(kStartBarrier, Traits::kThreads);
  gather_raw<Traits>(address(0, 0), raw, row, chunk);
  gather_raw<Traits>(address(0, 1), raw + Traits::kRawSlotBytes, row, chunk);
  gather_raw<Traits>(address(1, 0), raw + 2 * Traits::kRawSlotBytes, row, chunk);

  uint32_t raw_slot = raw;
  int here = 0;  // slot of this block's addresses
  for (int block = 0; shared.headers[block % Traits::kHeaderSlots].token >= 0; ++block) {
    const int stage = block & 1;
    const int next = here == Traits::kAddressSlots - 1 ? 0 : here + 1;
    const int after = next == Traits::kAddressSlots - 1 ? 0 : next + 1;
    walk.resolve();  // block + 2
    walk.fetch();    // block + 3
    if (block > 1) barrier_sync(kRowsEmptyBarrier + stage, 384);
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const uint2 values = load_shared_2(addresses + (here * 16 + pass * 8) * 16);
      const uint32_t mask = __ballot_sync(~0u, (values.x | values.y) != 0);
      if (lane == 0) shared.mask[stage][pass * 4 + warp] = mask;
      copy_async_wait<2>();
      __syncwarp();
      const uint32_t tile = stage * (Traits::kPanels * Traits::kPanelBytes) + pass * 32 * 128;
      const PassAddresses<Traits> at = {raw_slot + row * Traits::kRawRowBytes + chunk * 16,
                                        raw_slot + 8 * Traits::kRawRowBytes + row * 8, unit0 + tile,
                                        (unit0 ^ 16) + tile};
      convert_pass<Traits>(at, rope_unit + tile, odd);
      __syncwarp();
      gather_raw<Traits>(pass == 0 ? address(next, 1) : address(after, 0), raw_slot, row, chunk);
      raw_slot = raw_slot == raw + (Traits::kRawSlots - 1) * Traits::kRawSlotBytes
                     ? raw
                     : raw_slot + Traits::kRawSlotBytes;
    }
    here = next;
    fence_proxy_async();
    barrier_arrive(kRowsFullBarrier + stage, 256);
  }
}

/// bf16 rows: copied straight into the tile as soon as its stage is free; meanwhile those of the
/// next block are fetched into L2.
template <typename Traits>
__device__ __forceinline__ void load_bf16(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                          int warp, int lane) {
  const int row = lane >> 2, chunk = lane & 3;
  const uint32_t tile_row = shared_address(shared.rows) + (warp * 8 + row) * 128;
  const uint32_t addresses = shared_address(shared.addresses[warp]) + row * 16;
  const auto values_at = [&](int slot, int pass) {
    const uint2 value = load_shared_2(addresses + (slot * 16 + pass * 8) * 16);
    return reinterpret_cast<const std::byte*>(static_cast<uint64_t>(value.y) << 32 | value.x);
  };
  BlockWalk<Traits> walk(args, shared, warp, lane);
  for (int i = 0; i < 2; ++i) {
    walk.fetch();
    walk.resolve();
  }
  walk.fetch();
  __syncwarp();
  barrier_arrive(kStartBarrier, Traits::kThreads);

  int here = 0;
  for (int block = 0; shared.headers[block % Traits::kHeaderSlots].token >= 0; ++block) {
    const int stage = block & 1;
    const int next = here == Traits::kAddressSlots - 1 ? 0 : here + 1;
    walk.resolve();
    walk.fetch();
    if (block > 1) barrier_sync(kRowsEmptyBarrier + stage, 384);
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const std::byte* from = values_at(here, pass);
      const bool valid = from != nullptr;
      const uint32_t mask = __ballot_sync(~0u, valid);
      if (lane == 0) shared.mask[stage][pass * 4 + warp] = mask;
      from += chunk * 16;
      asm volatile("" : "+l"(from));  // one address register, immediate offsets
      const uint32_t to =
          tile_row + stage * (Traits::kPanels * Traits::kPanelBytes) + pass * 32 * 128;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        copy_async_16(to + (i >> 1) * Traits::kPanelBytes + ((((i & 1) * 4 + chunk) ^ row) << 4),
                      from + i * 64, valid);
      }
    }
    copy_async_commit();
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const std::byte* from = values_at(next, pass);
      if (from != nullptr) {
        prefetch_l2(from + chunk * 256);
        prefetch_l2(from + chunk * 256 + 128);
      }
    }
    here = next;
    copy_async_wait<0>();
    __syncwarp();
    fence_proxy_async();
    barrier_arrive(kRowsFullBarrier + stage, 256);
  }
}

}  // namespace dsv4::nvidia::sm90_attend
