// Sizes and shared memory of sm90_attend, and what its roles hand to each other.
#pragma once
#include <cstdint>

#include "dsv4/cache.h"

namespace dsv4::nvidia::sm90_attend {

template <KvFormat kFormatOfRows>
struct Traits {
  static constexpr KvFormat kFormat = kFormatOfRows;
  static constexpr int kHeadDim = 512;
  static constexpr int kTileHeads = 64;
  static constexpr int kBlockRows = 64;
  static constexpr int kThreads = 512;
  static constexpr int kStages = 2;

  // Panels of 64 columns: rows of 128 bytes with the 128-byte swizzle.
  static constexpr int kPanelBytes = 64 * 128;
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kQueryPanels = kPanels / 2;  // the other half lives in registers

  // Registers a thread: S role (as launched), the two output roles, the loader.
  static constexpr int kScoreRegisters = 128;
  static constexpr int kOutputRegisters = 160;
  static constexpr int kLoaderRegisters = 64;
  static_assert((kScoreRegisters + 2 * kOutputRegisters + kLoaderRegisters) * 128 <= 65536);

  // Rows under way between global memory and conversion. A slot holds 8 rows of one loader warp.
  static constexpr bool kConverts = kFormat != KvFormat::kBf16;
  static constexpr bool kHasScales = kFormat == KvFormat::kFp8DsMla;
  static constexpr int kFp8Columns = kHasScales ? 448 : 512;
  static constexpr int kRowBytes = kFormat == KvFormat::kFp8DsMla ? 576
                                   : kFormat == KvFormat::kFp8    ? 512
                                                                  : 1024;
  static constexpr int kRawRowBytes = 576;  // 64 mod 128: rows of a quarter warp hit other banks
  static constexpr int kRawSlots = kConverts ? 3 : 1;
  static constexpr int kRawSlotBytes = kConverts ? 8 * kRawRowBytes + 8 * 8 : 16;

  static constexpr int kAddressSlots = 6;  // blocks whose rows are known, the last one on its way
  static constexpr int kHeaderSlots = 8;   // power of two, more than loader and output lie apart
};

/// What the loader tells about a block; the output role reads it last.
struct alignas(16) BlockHeader {
  int32_t token;  // -1: there is no such block, the CTA is done
  int32_t tile;
  int32_t chain;
  uint32_t flags;
};
enum BlockFlags : uint32_t {
  kFirstBlock = 1,  // of the item
  kLastBlock = 2,   // of the item
  kOnlyChain = 4,   // the token has one chain: its output is final
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
  int32_t token, seq, info;        // info: tile, chain << 8, flags << 24
  int32_t blocks;                  // walked so far
  int32_t next_items;              // first item that no lane has looked at
  uint32_t pending;                // of the 32 before it: those that wait
  ComingItem coming;
  bool inside, compressed;  // the item has more blocks; the source is the compressed rows
};

template <typename Traits>
struct SharedStorage {
  alignas(1024) uint8_t query[Traits::kQueryPanels][Traits::kPanelBytes];
  alignas(1024) uint8_t rows[Traits::kStages][Traits::kPanels][Traits::kPanelBytes];
  alignas(1024) uint8_t p[Traits::kPanelBytes];
  alignas(16) uint8_t raw[4][Traits::kRawSlots][Traits::kRawSlotBytes];
  BlockHeader headers[Traits::kHeaderSlots];
  alignas(16) uint32_t mask[Traits::kStages][8];  // 8 rows a word, 4 equal bits a row
  alignas(16) uint64_t addresses[4][Traits::kAddressSlots][16];  // RowAddress
  WalkState walk[4];
  float alpha[Traits::kTileHeads];
  float2 sums[Traits::kTileHeads];  // reference maximum (base 2) and sum of a finished chain
};
static_assert(sizeof(SharedStorage<Traits<KvFormat::kFp8DsMla>>) <= 232448, "227 KB a CTA");

/// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kScoreBarrier = 1,      // within the S role
  kStartBarrier = 2,      // first headers are written
  kRowsFullBarrier = 3,   // + stage: loader -> S role
  kRowsEmptyBarrier = 5,  // + stage: output roles -> loader
  kPFullBarrier = 7,      // S role -> output roles
  kPEmptyBarrier = 8,     // output roles -> S role
};

}  // namespace dsv4::nvidia::sm90_attend
