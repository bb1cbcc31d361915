// Sizes and shared memory of sm90_attend_cluster.
#pragma once
#include "backends/nvidia/ops/attend_sm90.h"
#include "backends/nvidia/ops/attend_sm90_traits.h"

namespace dsv4::nvidia::sm90_attend {

/// A cluster of kClusterCtas CTAs shares an item.
template <KvFormat kFormatOfRows, int kClusterCtas>
struct ClusterTraits : Traits<kFormatOfRows> {
  using Base = Traits<kFormatOfRows>;
  static_assert(kClusterCtas == 2 || kClusterCtas == 4 || kClusterCtas == 8);
  static constexpr int kCtas = kClusterCtas;
  static constexpr int kColumns = Base::kHeadDim / kCtas;  // of values that a CTA sums
  static constexpr int kValuePanels = kColumns / 64;
  static constexpr int kProductColumns = kColumns < 128 ? kColumns : 128;  // of one product

  // Whether a CTA gets its columns of the other one's blocks as that one has converted them: it can
  // be sent in less time than a block takes where it is half of one.
  static constexpr bool kSendsValues = kCtas == 2;

  // Whether several clusters may have heads of an item each (AttendSm90Args::log2_shares).
  static constexpr bool kSharesHeads = kCtas == 8;

  // Warpgroups that load keys and values: as many as there are registers for, the second one where
  // it is worth more by measurement. Values go to theirs in turn, block by block.
  static constexpr int kKeyGroups = kCtas == 4 ? 1 : 2;
  static constexpr int kValueGroups = kCtas == 8 ? 1 : kCtas == 4 ? 2 : 0;
  static constexpr int kKeyWarps = 4 * kKeyGroups;
  static constexpr int kKeyPasses = Base::kBlockRows / (8 * kKeyWarps);
  // Whether weights go through the L2, from where one copy brings them to all CTAs; to a single
  // other one they go at once.
  static constexpr bool kMulticast = kCtas > 2;
  // Whether rows come to the loaders of keys by the copy engine, which has no part in the
  // load/store pipe; with one warpgroup, 8 of whose lanes a warp ask, they come too late.
  static constexpr bool kKeysByCopyEngine = kCtas == 8 && Base::kConverts;

  static constexpr int kGroups = 2 + kValueGroups + kKeyGroups;
  static constexpr int kThreads = 128 * kGroups;

  // Registers a thread. A launch has 128 for each of 512 threads, 96 for each of 640.
  static constexpr int kLaunchRegisters = kCtas == 2 ? 128 : 96;
  static constexpr int kScoreRegisters = 192;
  static constexpr int kOutputRegisters = kCtas == 2 ? 176 : kCtas == 4 ? 112 : 88;
  static constexpr int kKeyRegisters = 72;
  static constexpr int kValueRegisters = kCtas == 8 ? 56 : 48;
  static_assert(kScoreRegisters + kOutputRegisters + kKeyGroups * kKeyRegisters +
                    kValueGroups * kValueRegisters <=
                kLaunchRegisters * kGroups);

  static constexpr int kQueryPitch = 1024 + 16;  // bytes of a head: rows of 8 x 8 hit other banks
  // Blocks whose weights and values wait for the output role. Not more of the former than CTAs: a
  // CTA must not hear of two of its blocks at once.
  static constexpr int kWeightSlots = kCtas == 8 ? 6 : kCtas;
  static constexpr int kKeyStages = kSendsValues ? 2 : 1;
  static constexpr int kValueSlots = kCtas == 8 ? 4 : kCtas == 4 ? 2 : 1;
  // Blocks of values, for each group, under way between global memory and conversion, in units of
  // 16 bytes a lane. A panel of bf16 takes two.
  static constexpr int kRawValueSlots = kCtas == 8 ? 4 : 2;
  // Blocks that a warp converts together: alone one of 64 columns waits for latencies.
  static constexpr int kTurnBlocks = kCtas == 8 ? 2 : 1;
  static constexpr int kRawUnits =
      Base::kConverts ? kValuePanels + (Base::kHasScales ? 1 : 0) : 2 * kValuePanels;
  static constexpr int kRawKeyBytes = Base::kConverts ? 8 * Base::kRawRowBytes + 8 * 8 : 16;
};

/// A cluster's item.
struct ClusterItem {
  int32_t token;
  int32_t num_blocks;                        // 0: nothing to do
  int32_t window_blocks;                     // of them, the first ones
  uint32_t tile : 8, chain : 16, flags : 8;  // as in BlockHeader
};

/// Its rows of the window or the compressed ones, in words as RowFinder loads them.
struct alignas(16) ClusterRows {
  int32_t first;       // row 0 of block b of the item would be place first + 64 b
  int32_t begin, end;  // places
  int32_t is_list;
  const int32_t* places;  // slots, or the sequence's block table
  FastDivisor by_rows, by_columns;
  const std::byte* base;
  int64_t page_stride;
};
static_assert(sizeof(ClusterRows) == 64);

/// What the CTA that owns a block tells all others, by warps of 16 heads. Registers of its threads,
/// for the same threads of the output roles.
struct BlockWeights {
  uint4 p[4][32];       // A fragments, 16 keys each
  float2 sums[32];      // of heads row, row + 8, over the keys of a thread
  float2 reference[8];  // of lane / 4: reference maxima of both heads
};

/// Rows under way to the loaders of values.
template <typename Traits, bool kSendsValues = Traits::kSendsValues>
struct RawValues {
  uint4 raw_values[Traits::kValueGroups][Traits::kRawValueSlots][4][2][Traits::kRawUnits]
                  [32];  // warp, pass, unit, lane
  uint2 raw_scales[Traits::kValueGroups][Traits::kRawValueSlots][4][2][8];
};
template <typename Traits>
struct RawValues<Traits, true> {};

template <typename Traits>
struct ClusterStorage : RawValues<Traits> {
  // Blocks of this CTA. At first, keys and what follows hold the query.
  alignas(1024) uint8_t keys[Traits::kKeyStages][Traits::kPanels][Traits::kPanelBytes];
  // Columns of this CTA.
  alignas(1024) uint8_t values[Traits::kValueSlots][Traits::kValuePanels][Traits::kPanelBytes];
  alignas(16) uint8_t raw_keys[Traits::kKeyWarps][Traits::kKeyPasses][Traits::kRawKeyBytes];
  BlockWeights weights[Traits::kWeightSlots * 4];  // WeightSlots
  float2 maxima[2][Traits::kCtas][4][8];  // round parity, CTA, warp, lane / 4: of row, row + 8
  alignas(16) uint32_t mask[2][8];        // round parity; 8 rows a word, 4 equal bits a row
  ClusterItem item;
  ClusterRows sources[2];  // window, compressed

  // mbarriers within the CTA
  uint64_t query_taken;
  uint64_t raw_full[Traits::kKeyWarps][Traits::kKeyPasses];  // rows of a warp's pass
  uint64_t keys_full[Traits::kKeyStages], keys_empty[Traits::kKeyStages];
  uint64_t values_full[Traits::kValueSlots], values_empty[Traits::kValueSlots];
  // mbarriers at which other CTAs arrive, or their bytes. Where values are sent, values_full is one
  // of them, and values_empty tells that the other CTA has read what this one has sent.
  uint64_t maxima_full[2][4];
  uint64_t weights_full[Traits::kWeightSlots * 4];
  uint64_t weights_free[4];  // the slot of this CTA's next block, in all CTAs
};
template <typename Traits>
constexpr bool cluster_storage_fits() {
  using Storage = ClusterStorage<Traits>;
  return sizeof(Storage) <= 232448 && Traits::kTileHeads * Traits::kQueryPitch <=
                                          sizeof(Storage::keys) + sizeof(Storage::values);
}
static_assert(cluster_storage_fits<ClusterTraits<KvFormat::kFp8DsMla, 2>>());
static_assert(cluster_storage_fits<ClusterTraits<KvFormat::kBf16, 2>>());
static_assert(cluster_storage_fits<ClusterTraits<KvFormat::kFp8DsMla, 4>>());
static_assert(cluster_storage_fits<ClusterTraits<KvFormat::kFp8DsMla, 8>>());
static_assert(cluster_storage_fits<ClusterTraits<KvFormat::kBf16, 4>>());
static_assert(cluster_storage_fits<ClusterTraits<KvFormat::kBf16, 8>>());

}  // namespace dsv4::nvidia::sm90_attend
