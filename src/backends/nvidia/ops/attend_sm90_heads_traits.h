// Sizes and shared memory of sm90_attend_heads, and what its roles hand to each other.
#pragma once
#include <cstdint>

#include "dsv4/cache.h"

namespace dsv4::nvidia::sm90_attend_heads {

/// `kWindowsAlone`: for calls without compressed rows, whose items are a few blocks.
template <KvFormat kFormatOfRows, int kHeadsOfTile, bool kWindowsAlone = false>
struct Traits {
  static_assert(kHeadsOfTile == 16 || (kHeadsOfTile == 32 && kFormatOfRows != KvFormat::kBf16));
  static_assert(!kWindowsAlone || (kHeadsOfTile == 16 && kFormatOfRows != KvFormat::kBf16));
  static constexpr KvFormat kFormat = kFormatOfRows;
  static constexpr int kHeads = kHeadsOfTile;
  static constexpr int kHeadDim = 512;
  static constexpr int kBlockRows = 64;
  static constexpr int kThreads = 512;

  // Panels of 64 columns: rows of 128 bytes with the 128-byte swizzle.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kPanelBytes = kBlockRows * 128;
  static constexpr int kHeadPanelBytes = kHeads * 128;  // of the query, or of P

  static constexpr bool kHasScales = kFormat == KvFormat::kFp8DsMla;
  static constexpr int kFp8Panels = kHasScales ? 7 : kFormat == KvFormat::kFp8 ? 8 : 0;

  static constexpr int kRowBytes = kFp8Panels * 64 + (kPanels - kFp8Panels) * 128;

  // The tile of a block is given back in parts; blocks follow each other through a ring of
  // kTileSlots parts, two tiles, or two and a half, which leave half of the room for rows under
  // way: 3% faster for windows alone, 1% to 3% slower for lists (docs/kernels).
  static constexpr int kTileParts = kWindowsAlone ? 4 : 2;
  static constexpr int kTileSlots = kWindowsAlone ? 10 : 4;
  static constexpr int kPartPanels = kPanels / kTileParts;

  // Rows under way between global memory and conversion, of one warp: 16 rows of kRing panels. The
  // copy of a panel starts when the one kRing before it has been converted.
  static constexpr int kRing = (kHeads == 16 && !kWindowsAlone ? 8 : 4) / (kFp8Panels > 0 ? 1 : 2);
  static constexpr int kFp8SlotBytes = 16 * 64;
  static constexpr int kWideSlotBytes = 16 * 128;
  static constexpr int kRawBytes =
      kFp8Panels == 0 ? kRing * kWideSlotBytes
                      : kRing * kFp8SlotBytes + (kHasScales ? kWideSlotBytes - kFp8SlotBytes : 0);
  static_assert(kPanels % kRing == 0);

  // Registers a thread: the rows roles, the output role, walk and query.
  static constexpr int kRowsRegisters = kHeads == 16 ? 136 : 112;
  static constexpr int kOutputRegisters = kHeads == 16 ? 112 : 168;
  static constexpr int kWalkRegisters = kHeads == 16 ? 128 : 120;
  static_assert((2 * kRowsRegisters + kOutputRegisters + kWalkRegisters) * 128 <= 65536);

  // Blocks whose addresses wait to be read by their rows role, which does so two blocks ahead, and
  // blocks of which the output role may still read the header: rows of a block that has begun are
  // written over those of four blocks earlier.
  static constexpr int kAddressSlots = 4, kHeaderSlots = 16;
};

/// Most items of which blocks are dealt out; of more, turns of whole items waste little.
constexpr int kMaxDealtItems = 1024;

/// What a CTA has to do (attend_sm90_heads_deal.cuh): items begin, begin + stride, ... below `end`.
struct Share {
  int32_t begin, end, stride;
  int32_t first_blocks;  // the first blocks of item `begin`, the others are handed over; 0: all
  int32_t last_blocks;   // the last blocks of item `end` - 1, taken over; 0: all
};

/// What the walk tells about a block.
struct BlockHeader {
  int32_t token;  // -1: there is no such block, the CTA is done
  uint16_t chain, flags;
};
enum BlockFlags : uint32_t {
  kFirstBlock = 1,   // of the item, or of this CTA's share of it
  kLastBlock = 2,    // of the same
  kOnlyChain = 4,    // the token has one chain: its output is final
  kOddItem = 8,      // phase of the query
  kLastOfRole = 16,  // of the blocks of an item that its rows role has
  kTakenOver = 32,   // blocks of the item before these are another CTA's
  kHandedOver = 64   // blocks of the item after these are another CTA's
};

/// Where a part of a block's tile lies, and how many parts lay there before it: the barrier of that
/// place ends its phase `before` when the part has been used up.
template <typename Traits>
struct TilePart {
  uint32_t slot, before;

  __device__ __forceinline__ TilePart(int block, int part) {
    const auto index = static_cast<uint32_t>(block * Traits::kTileParts + part);
    slot = index % Traits::kTileSlots;
    before = index / Traits::kTileSlots;
  }
  __device__ __forceinline__ static TilePart last_of(int block) {
    return {block, Traits::kTileParts - 1};
  }
};

/// mbarriers between roles: all threads of the giving role arrive, all of the taking one wait.
template <typename Traits>
struct Barriers {
  uint64_t known[Traits::kAddressSlots];  // walk -> rows role
  uint64_t freed[Traits::kAddressSlots];  // rows role -> walk
  // Halves of the query, by a warp each, once an item: while one role ends an item, the other one
  // is half a block into the next.
  uint64_t query_full[2];   // query role -> rows roles
  uint64_t query_empty[2];  // both rows roles -> query role
  uint64_t taken_over;      // query role -> rows roles, once: what comes from another CTA is there
  // By parity of the block:
  uint64_t reference_known[2];  // rows role -> the other rows role
  uint64_t full[2];             // rows role -> output role
  // By part of a tile (TilePart):
  uint64_t empty[Traits::kTileSlots];  // output role -> rows roles
};

template <typename Traits>
struct SharedStorage {
  alignas(1024) uint8_t rows[Traits::kTileSlots][Traits::kPartPanels][Traits::kPanelBytes];
  alignas(1024) uint8_t query[Traits::kPanels][Traits::kHeadPanelBytes];
  alignas(1024) uint8_t p[2][Traits::kHeadPanelBytes];                        // by head: 64 rows
  alignas(128) uint8_t raw[2][4][Traits::kRawBytes];                          // rows role, warp
  alignas(16) uint64_t addresses[Traits::kAddressSlots][Traits::kBlockRows];  // RowAddress
  alignas(16) uint64_t scales[2][4][Traits::kHasScales ? 16 : 1];  // rows role, warp, row
  alignas(16) BlockHeader headers[Traits::kHeaderSlots];
  Share share;
  Barriers<Traits> barriers;
  // By parity of the block.
  alignas(16) float maxima[2][4][Traits::kHeads];   // of a warp's rows; then item_sums
  alignas(16) float sums[2][4][4][Traits::kHeads];  // of p over a warp's rows, in four parts
  alignas(16) float reference[2][Traits::kHeads];   // maximum that p refers to, base 2
  alignas(16) float alpha[2][Traits::kHeads];       // 2^(reference before - reference)
  alignas(16) float taken_over[Traits::kHeads];     // reference of the blocks before the share

  /// Four parts of the sums of an item whose last block this is: where its maxima were, from
  /// `full` to `empty`.
  __device__ __forceinline__ float (&item_sums(int stage))[4][Traits::kHeads] {
    return maxima[stage];
  }
};
static_assert(sizeof(SharedStorage<Traits<KvFormat::kFp8DsMla, 16>>) <= 232448, "227 KB a CTA");
static_assert(sizeof(SharedStorage<Traits<KvFormat::kFp8DsMla, 16, true>>) <= 232448);
static_assert(sizeof(SharedStorage<Traits<KvFormat::kFp8DsMla, 32>>) <= 232448, "227 KB a CTA");
static_assert(sizeof(SharedStorage<Traits<KvFormat::kBf16, 16>>) <= 232448, "227 KB a CTA");

}  // namespace dsv4::nvidia::sm90_attend_heads
