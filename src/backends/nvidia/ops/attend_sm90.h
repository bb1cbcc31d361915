// The Hopper candidate of attend: what its kernels are launched with, and its host side.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "backends/nvidia/ops/attend.h"

namespace dsv4::nvidia {

/// n / divisor by a product, for 0 <= n < 2^31.
struct FastDivisor {
  uint32_t multiplier = 1u << 31;
  int32_t shift = 31;
  int32_t divisor = 1;

  FastDivisor() = default;
  explicit FastDivisor(int32_t d) : divisor(d) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    const auto wide = static_cast<uint64_t>(d);
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + wide - 1) / wide);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int32_t divide(int32_t n) const {
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >>
                                shift);
  }
#endif
};

/// Partial results of chains, [token, tile, chain]: values as the kernel's threads hold them,
/// 64 x 512 floats, and the maximum (base 2, -inf without rows) and sum of 64 heads.
struct ChainResults {
  float4* values = nullptr;
  float2* sums = nullptr;
};

/// Compressed blocks of a part: a chain twice as long has two, others are one part. Long enough
/// that window + 1024 selected rows are one.
constexpr int kPartBlocks = 16;

/// Values of the first part of a CTA's item, by output role, vector and thread.
struct FirstPart {
  float4 values[2][32][128];
};

/// What the CTA that begins an item leaves for the one that goes on with it
/// (attend_sm90_deal.cuh): values as FirstPart has them, reference maxima and sums of the S role's
/// threads, and marks that they are there: of either half of the values, and of the sums.
struct HandOver {
  float4 values[2][32][128];
  float4 sums[128];
  uint64_t marks[4];
};

/// A mark of 64 bits that no launch had before and that memory does not hold by chance.
uint64_t next_mark();

/// Most CTAs that leave something for later or for each other, for which scratch has room:
/// multiprocessors of the largest Hopper chip.
constexpr int kMaxPersistentCtas = 144;

/// Weights of two blocks.
constexpr int kClusterWeightBytes = 2 * 4 * 2368;

/// Of a token's queries that attend rotates, and back of its outputs (AttendParams::rotation).
struct TokenRotation {
  const int32_t* positions = nullptr;
  const float* frequencies = nullptr;  ///< [32]
};

/// Where outputs leave as the codes that inverse_rope makes of them.
struct RotatedCodes {
  float* scale = nullptr;  ///< [heads * 512 / 128][scale_stride]; null: as values
  int64_t scale_stride = 0;
};

struct AttendSm90Args {
  CUtensorMap q_map, out_map;  ///< bytes: dims, heads, tokens
  AttendArgs attend;
  FastDivisor window_rows, window_columns, compressed_rows, compressed_columns;
  FastDivisor chain_items;       ///< items of a chain: tokens x tiles
  int32_t log2_tiles = 0;        ///< tiles of 64 heads: 1 or 2
  int32_t num_items = 0;         ///< max_chains x tokens x tiles
  int32_t log2_shares = 0;       ///< clusters that share the heads of an item: 1, 2 or 4
  bool wide_rows = true;         ///< rows lie at multiples of 16 bytes
  bool starts_early = false;     ///< rows are ranges, found while kernels before are under way
  ChainResults chains;           ///< only where max_chains > 1
  std::byte* weights = nullptr;  ///< of clusters, on their way: kClusterWeightBytes of every CTA
  /// Parts of a chain (kPartBlocks) begin anew and are merged in ascending order. Where items are
  /// few, parts are dealt out as chains of `attend` are: `results_per_chain` of them are merged
  /// first. Elsewhere an item is a whole chain, whose second part begins at row `part_rows` of it
  /// (a power of two), and its CTA keeps the values of the first one in `first_parts`.
  int32_t part_rows = 1 << 30;
  int32_t results_per_chain = 1;
  FirstPart* first_parts = nullptr;  ///< one a CTA
  /// Where blocks are dealt out instead of items: one a CTA. Nobody clears that memory, `mark` is
  /// the launch's own.
  HandOver* hand_overs = nullptr;
  uint64_t mark = 0;
  int32_t dealt_blocks = 0;  ///< of an item, at most
  TokenRotation rotation;    ///< where queries are raw, or codes made
  bool raw_queries = false;  ///< AttendParams::raw_queries
  float query_eps = 0;       ///< of their norm
  RotatedCodes codes;        ///< where the kernel makes them
};

/// Empty where the kernel takes the call, else why not. Looks at shapes, formats and strides alone.
const char* attend_sm90_why_not(const AttendArgs& args);
/// Warp-specialised wgmma kernels for sm_90a: one for tiles of 64 heads, with one CTA or a cluster
/// of them an item, and one for up to 32 heads (attend_sm90_heads.h). All give the same bits, so
/// that the number of items may choose. What they do not take goes to attend_sm80.
void attend_sm90(const AttendParams& params, const OpContext& context);
/// Are the outputs of this call codes where it is asked for (AttendParams::rotation)? Where every
/// item is one CTA's and one chain.
bool attend_sm90_makes_codes(const AttendParams& params);
/// Does it norm and rotate queries in this call (AttendParams::raw_queries)? Of many items, one
/// CTA and one chain each; few wait longer for it than for a launch.
bool attend_sm90_takes_raw_queries(const AttendParams& params);
/// The same as attend_sm90, but the kernel for few heads takes all calls that it can take, or none:
/// for tests.
void attend_sm90_few_heads(const AttendParams& params, const OpContext& context);
void attend_sm90_many_heads(const AttendParams& params, const OpContext& context);
/// Scratch of a call with at most `max_entries` compressed rows a token, in default grids.
int64_t attend_sm90_scratch_bytes(const ScratchLimits& limits, int64_t max_entries);

/// Launches the kernel for one row format, with one CTA an item; `grid` CTAs. Chains may have parts
/// (`first_parts`), items be cut (`hand_overs`), outputs leave as `codes` says.
template <KvFormat kFormat>
void launch_attend_sm90(const AttendSm90Args& args, int grid, cudaStream_t stream);
/// Merges the chains of tokens that have several (attend_sm90_merge.cu).
void merge_chains_sm90(const AttendSm90Args& args, cudaStream_t stream);
/// The same with kCtas (2, 4 or 8) CTAs an item (attend_sm90_cluster.cuh), for as many items as
/// clusters can run at once: attend_sm90_clusters, asked of the device once.
template <KvFormat kFormat, int kCtas>
int attend_sm90_clusters();
template <KvFormat kFormat, int kCtas>
void launch_attend_sm90_cluster(const AttendSm90Args& args, cudaStream_t stream);

}  // namespace dsv4::nvidia
