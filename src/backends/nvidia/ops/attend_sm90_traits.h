// Sizes and shared memory of sm90_attend, and what its roles hand to each other.
#pragma once
#include <cstdint>

#include "backends/gpu/math.h"
#include "dsv4/cache.h"

namespace dsv4::nvidia::sm90_attend {

template <KvFormat kFormatOfRows, bool kMakesCodes = false, bool kTakesRawQueries = false>
struct Traits {
  static constexpr bool kCodes = kMakesCodes;  // outputs leave as codes (attend_sm90_codes.cuh)
  // Queries are normed and rotated here (attend_sm90_queries.cuh).
  static constexpr bool kRawQueries = kTakesRawQueries;
  static constexpr KvFormat kFormat = kFormatOfRows;
  static constexpr int kHeadDim = 512;
  static constexpr int kTileHeads = 64;
  static constexpr int kBlockRows = 64;
  static constexpr int kThreads = 512;
  static constexpr int kStages = 2;

  // Panels of 64 columns: rows of 128 bytes with the 128-byte swizzle.
  static constexpr int kPanelBytes = 64 * 128;
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kPanelStride = kPanelBytes;  // to the next panel
  static constexpr int kGroupStride = 8 * 128;      // to the next 8 rows
  static constexpr int kQueryPanels = kPanels / 2;  // the other half lives in registers

  // Registers a thread: S role (as launched), the two output roles, the loader.
  static constexpr int kScoreRegisters = 128;
  static constexpr int kOutputRegisters = 160;
  static constexpr int kLoaderRegisters = 64;
  static_assert((kScoreRegisters + 2 * kOutputRegisters + kLoaderRegisters) * 128 <= 65536);

  static constexpr bool kConverts = kFormat != KvFormat::kBf16;
  static constexpr bool kHasScales = kFormat == KvFormat::kFp8DsMla;
  static constexpr int kFp8Columns = kHasScales ? 448 : 512;
  static constexpr int kRowBytes = kFormat == KvFormat::kFp8DsMla ? 576
                                   : kFormat == KvFormat::kFp8    ? 512
                                                                  : 1024;
  static constexpr int kRawRowBytes = 576;  // 64 mod 128: rows of a quarter warp hit other banks

  // Codes under way between global memory and conversion, by loader warp: a unit is a panel of its
  // 16 rows of a block. The copy of a panel starts when the one kRing before it has been converted.
  static constexpr int kFp8Panels = kConverts ? kFp8Columns / 64 : 0;
  static constexpr int kRing = 5;
  static constexpr int kUnitBytes = 16 * 64;
  static constexpr int kRawBytes = kConverts ? kRing * kUnitBytes : 16;

  // Blocks of which the output roles know the addresses ahead of their own: those in stages and
  // those under way.
  static constexpr int kBlocksAhead = kStages + 2;
  static constexpr int kBlocksFetched = 1;  // beyond those: their places are on their way
  static constexpr int kAddressSlots = kBlocksAhead + kBlocksFetched + 1;
  static constexpr int kHeaderSlots = 8;  // power of two, more than loader and output lie apart
};

/// What the loader tells about a block; the output role reads it last.
struct BlockHeader {
  int32_t token;  // -1: there is no such block, the CTA is done
  uint32_t tile : 8, chain : 16, flags : 8;
};
enum BlockFlags : uint32_t {
  kFirstBlock = 1,   // of the item; not of a part that is taken over
  kLastBlock = 2,    // of the item, or of what this CTA has of it
  kOnlyChain = 4,    // the output is final: of the token's only chain, and not handed over
  kEndOfPart = 8,    // of the first of two parts of the item
  kLaterPart = 16,   // of the second one
  kOddItem = 32,     // phase of barriers that serve an item
  kHandedOver = 64,  // blocks of the item after these are another CTA's
  kTakenOver = 128,  // the first one here of an item whose blocks before it are another CTA's
};

/// What a CTA has of an item, where blocks are dealt out.
enum ItemPart : int32_t { kWholeItem = 0, kItemHead = 1, kItemTail = 2 };
/// A CTA's share then (attend_sm90_deal.cuh), in the order of the work.
struct DealtShare {
  int32_t head;                    // the item of which it has the first blocks, or -1
  int32_t first, past;             // whole items
  int32_t tail;                    // the item of which it has the last blocks, or -1
  int32_t head_share, tail_share;  // num_ctas-ths of those items before the cuts
};

/// The item after the current one; its numbers are copied asynchronously, in this order.
struct ComingItem {
  int32_t item;  // -1: none
  int32_t seq, window_begin, window_end, entry_begin, entry_end;
};

/// Where a warp is in its walk over blocks (BlockWalk).
struct WalkState {
  const int32_t* places;           // of the current source: slots, or the sequence's block table
  int32_t first, begin, end;       // its rows; `first` begins the next block
  int32_t entry_begin, entry_end;  // compressed rows of the item
  int32_t token, seq;
  uint32_t chain : 16, tile : 8;
  uint32_t only_chain : 1;  // kOnlyChain
  uint32_t inside : 1;      // the item has more blocks
  uint32_t later_part : 1;  // the first part of the item is over
  uint32_t compressed : 1;  // the source is the compressed rows
  uint32_t odd_item : 1;    // the first item is
  uint32_t part : 2;        // ItemPart, where blocks are dealt out
  int32_t next_items;       // first item that no lane has looked at
  uint32_t pending;         // of the 32 before it: those that wait
  DealtShare share;         // instead of `pending`; next_items: -1 for the head, then items
  ComingItem coming;
};

/// Which blocks and rows come next.
template <typename Traits>
struct WalkStorage {
  alignas(16) BlockHeader headers[Traits::kHeaderSlots];
  // RowAddress, by loader warp
  alignas(16) uint64_t addresses[4][Traits::kAddressSlots][16];
  WalkState states[4];
};

/// mbarriers between the roles of a CTA. All threads of a role arrive, all threads of the other one
/// wait; phase n of a barrier of a stage is that of the n-th block there.
template <typename Traits>
struct Barriers {
  uint64_t rows_full[Traits::kStages][2];   // loader -> S role, panels 0-3 and 4-7
  uint64_t rows_empty[Traits::kStages][2];  // output roles -> loader, panels 0-3 and 4-7
  uint64_t blocks_known[2];                 // walk -> all: the first two blocks; those ahead. Once
  uint64_t places_known;                    // first blocks of BlockWalk::find_addresses. Once
  uint64_t p_full;                          // S role -> output roles
  uint64_t p_empty;                         // output roles -> S role
  uint64_t factors_known;                   // S role -> output roles, in items of one part
  uint64_t query_full[2];                   // the copy engine -> S role: dims 0-255, 256-511
  uint64_t query_taken;                     // S role -> first output role: next_query has been read
  uint64_t output_read;                     // first output role -> S role: and can be written again
  uint64_t parts_full[2];  // the copy engine -> output roles; twice an item of two parts
};

template <typename Traits>
struct SharedStorage {
  alignas(1024) uint8_t query[Traits::kQueryPanels][Traits::kPanelBytes];
  alignas(1024) uint8_t rows[Traits::kStages][Traits::kPanels][Traits::kPanelBytes];
  alignas(1024) uint8_t p[Traits::kPanelBytes];
  // Dims 256-511 of the next query on their way to registers, then dims 0-255 of the output.
  alignas(1024) uint8_t next_query[Traits::kQueryPanels][Traits::kPanelBytes];
  alignas(128) uint8_t raw[4][Traits::kRawBytes];
  alignas(16) uint64_t scales[4][2][Traits::kHasScales ? 16 : 1];  // warp, parity of block, row
  WalkStorage<Traits> walk;
  alignas(16) uint32_t mask[Traits::kStages][8];  // 8 rows a word, 4 equal bits a row
  Barriers<Traits> barriers;
  float alpha[Traits::kTileHeads];
  // Of a head: maximum and sum of the first part of an item, kept by the S role; at the end of the
  // item the factor of its accumulators, and PartWeights of both parts.
  float2 finished[Traits::kTileHeads];
  // Maximum and sum of an item, by its parity: read when the S role may be at the end of the next.
  float2 sums[2][Traits::kTileHeads];
  // Cos and sin of the inverse rotation of an item, in the same way.
  alignas(16) gpu::CosSin angles[2][Traits::kCodes ? 32 : 1];
};
static_assert(sizeof(SharedStorage<Traits<KvFormat::kFp8DsMla, true>>) <= 232448, "227 KB a CTA");

/// Named barriers within the S role, and within the output role of either half; 0 is __syncthreads.
constexpr int kScoreBarrier = 1, kOutputBarrier = 2;

}  // namespace dsv4::nvidia::sm90_attend
