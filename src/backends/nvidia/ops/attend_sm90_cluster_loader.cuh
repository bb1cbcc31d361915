// The loaders of sm90_attend_cluster: rows as keys of the blocks that a CTA owns, and the columns
// that it sums of the rows of all blocks. Each warp gathers and converts for itself. Clusters of 2:
// attend_sm90_cluster_pair.cuh.
#pragma once
#include <cuda_fp16.h>

#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/cluster.h"
#include "backends/nvidia/ops/attend_rows.cuh"
#include "backends/nvidia/ops/attend_sm90_cluster_traits.h"
#include "backends/nvidia/ops/attend_sm90_loader.cuh"

namespace dsv4::nvidia::sm90_attend {

/// Address of `member` of the CTA's storage, which lies at `base`. With a base that the compiler
/// does not know, it does not look for the window of the CTA anew for every address.
template <typename Storage>
__device__ __forceinline__ uint32_t storage_base(const Storage& shared) {
  uint32_t base = shared_address(&shared);
  asm volatile("" : "+r"(base));
  return base;
}
template <typename Storage>
__device__ __forceinline__ uint32_t member_address(uint32_t base, const Storage& shared,
                                                   const void* member) {
  return base + static_cast<uint32_t>(static_cast<const std::byte*>(member) -
                                      reinterpret_cast<const std::byte*>(&shared));
}

struct ItemPlace {
  int token, tile, chain;
};
template <typename Traits>
__device__ __forceinline__ int cluster_of_cta() {
  return static_cast<int>(blockIdx.x) / Traits::kCtas;
}
template <typename Traits>
__device__ __forceinline__ ItemPlace item_of_cluster(const AttendSm90Args& args) {
  const int item = cluster_of_cta<Traits>() >> args.log2_shares;
  const int chain = args.chain_items.divide(item);
  const int rest = item - chain * args.chain_items.divisor;
  const int token = rest >> args.log2_tiles;
  return {token, rest - (token << args.log2_tiles), chain};
}

/// Which of the clusters that share an item's heads this one is, and whether it has the 16 heads of
/// a warp of the S and output roles. Other warps take part in products alone.
template <typename Traits>
__device__ __forceinline__ int share_of_cluster(const AttendSm90Args& args) {
  return cluster_of_cta<Traits>() & ((1 << args.log2_shares) - 1);
}
template <typename Traits>
__device__ __forceinline__ bool has_heads(const AttendSm90Args& args, int warp) {
  if (!Traits::kSharesHeads) return true;
  // A vote, so that the compiler sees whole warps.
  return __any_sync(~0u, warp >> (2 - args.log2_shares) == share_of_cluster<Traits>(args));
}

/// Into L2, while the kernel before may still run, what this CTA reads first and can name already:
/// lists and numbers of its item (prefetch_lists) by one warpgroup, its part of the query by
/// another one.
template <typename Traits>
__device__ __forceinline__ void prefetch_query(const AttendSm90Args& args, int rank, int thread) {
  const int heads = 64 / Traits::kCtas >> args.log2_shares;
  const ItemPlace item = item_of_cluster<Traits>(args);
  const int first =
      item.tile * 64 + (share_of_cluster<Traits>(args) * Traits::kCtas + rank) * heads;
  for (int i = thread; i < heads * 8; i += 128) {
    const int head = first + i / 8;
    if (head < args.attend.num_heads) {
      prefetch_l2(args.attend.q + item.token * args.attend.q_token_stride +
                  head * args.attend.q_head_stride + i % 8 * 64);
    }
  }
}

/// Finds out about this cluster's item. By one thread.
template <typename Traits>
__device__ __forceinline__ void start_item(const AttendSm90Args& args,
                                           ClusterStorage<Traits>& shared) {
  constexpr int kRows = Traits::kBlockRows;
  const auto [token, tile, chain] = item_of_cluster<Traits>(args);
  const TokenBlocks rows = token_blocks(args.attend, token);
  const ChainBlocks blocks = chain_blocks(args.attend, rows, chain);
  shared.item.token = token;
  // A token without rows has one block, wholly masked.
  shared.item.num_blocks = max(blocks.count, chain == 0 ? 1 : 0);
  const int first_head = tile * 64 + share_of_cluster<Traits>(args) * (64 >> args.log2_shares);
  if (first_head >= args.attend.num_heads) shared.item.num_blocks = 0;
  shared.item.window_blocks = blocks.window_blocks;
  shared.item.tile = static_cast<uint32_t>(tile);
  shared.item.chain = static_cast<uint32_t>(chain);
  shared.item.flags = rows.num_chains == 1 ? kOnlyChain : 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const RowSource& from = i == 0 ? args.attend.window : args.attend.compressed;
    ClusterRows& to = shared.sources[i];
    const int past_end = (blocks.compressed_first + blocks.count - blocks.window_blocks) * kRows;
    to.first =
        i == 0 ? rows.window_begin : (blocks.compressed_first - blocks.window_blocks) * kRows;
    to.begin = i == 0 ? rows.window_begin : rows.compressed_begin;
    to.end = i == 0 ? rows.window_end : min(rows.compressed_end, past_end);
    to.is_list = from.kind == RowSource::kList;
    to.places = to.is_list ? from.slots + token * from.slots_stride
                           : from.table + rows.seq * from.table_stride;
    to.by_rows = i == 0 ? args.window_rows : args.compressed_rows;
    to.by_columns = i == 0 ? args.window_columns : args.compressed_columns;
    to.base = from.base;
    to.page_stride = from.block_stride_bytes;
  }
}

/// Where rows lie, in two steps: a load of a slot or a block table's entry, and what follows. Made
/// of few dependent loads and no branches: warps that do this do not have much else to do
/// meanwhile.
struct RowFinder {
  uint32_t sources;  // address of ClusterStorage::sources
  int window_blocks;

  struct Place {
    int32_t loaded;   // negative: masked
    uint32_t tagged;  // row within its page, or kListRow; kCompressedRow
  };
  static constexpr uint32_t kCompressedRow = 1u << 31;
  static constexpr uint32_t kListRow = kCompressedRow - 1;

  __device__ __forceinline__ static int divide(int n, uint32_t multiplier, uint32_t shift) {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> shift);
  }
  __device__ __forceinline__ Place load(int block, int row) const {
    const bool compressed = block >= window_blocks;
    const uint32_t source = sources + (compressed ? sizeof(ClusterRows) : 0);
    const uint4 range = load_shared_16(source);
    const uint4 pages = load_shared_16(source + 16);    // places, multiplier and shift by rows
    const uint4 columns = load_shared_16(source + 32);  // divisor by rows; by columns
    const int place = row + block * 64 + static_cast<int>(range.x);
    const bool masked = place < static_cast<int>(range.y) || place >= static_cast<int>(range.z);
    const int page = divide(place, pages.z, pages.w);
    const int column = page - divide(page, columns.y, columns.z) * static_cast<int>(columns.w);
    const bool list = range.w != 0;
    const auto* places =
        reinterpret_cast<const int32_t*>(static_cast<uint64_t>(pages.y) << 32 | pages.x);
    Place out{-1, list ? kListRow : static_cast<uint32_t>(place) - page * columns.x};
    if (!masked) out.loaded = __ldg(places + (list ? place : column));
    if (compressed) out.tagged |= kCompressedRow;
    return out;
  }

  template <typename Traits>
  __device__ __forceinline__ RowAddress address(const Place& place) const {
    const uint32_t source =
        sources + ((place.tagged & kCompressedRow) != 0 ? sizeof(ClusterRows) : 0);
    const uint4 pages = load_shared_16(source + 16);
    const uint4 columns = load_shared_16(source + 32);
    const uint4 memory = load_shared_16(source + 48);
    int page = place.loaded;
    uint32_t offset = place.tagged & kListRow;
    if (offset == kListRow) {
      page = divide(place.loaded, pages.z, pages.w);
      offset = place.loaded - page * columns.x;
    }
    const uint64_t base = static_cast<uint64_t>(memory.y) << 32 | memory.x;
    const uint64_t stride = static_cast<uint64_t>(memory.w) << 32 | memory.z;
    const uint32_t to_scales = columns.x * Traits::kRowBytes - offset * (Traits::kRowBytes - 8);
    const RowAddress found =
        RowAddress::of(reinterpret_cast<const std::byte*>(base + page * stride +
                                                          uint64_t{offset} * Traits::kRowBytes),
                       Traits::kHasScales ? static_cast<int>(to_scales) : 0);
    return {place.loaded < 0 ? 0 : found.bits};
  }
};
template <typename Traits>
__device__ __forceinline__ RowFinder row_finder(uint32_t base,
                                                const ClusterStorage<Traits>& shared) {
  return {member_address(base, shared, shared.sources), shared.item.window_blocks};
}

/// The address that lane `lane` found.
__device__ __forceinline__ RowAddress address_of_lane(RowAddress own, int lane) {
  return {__shfl_sync(~0u, own.bits, lane)};
}

/// Before a loader of keys reads the first rows, those of `kRows` lanes' places; if they can be
/// named sooner than the kernels before end, they are on their way to the L2 meanwhile, where those
/// write, too. Not those of later blocks: the first ones would stand behind them.
template <typename Traits, int kRows>
__device__ __forceinline__ void wait_for_rows(const RowFinder& finder,
                                              const RowFinder::Place& place, int lane) {
  if (lane < kRows) {
    const RowAddress found = finder.address<Traits>(place);
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) prefetch_row<Traits>(found, chunk);
  }
  sm90::wait_for_kernels_before();
}

/// As gather_raw, but rows come by the copy engine, which has no part in the load/store pipe, and
/// count at `full`. `mask` has 4 equal bits a row.
template <typename Traits>
__device__ __forceinline__ void gather_whole_rows(RowAddress address, uint32_t mask, bool wide,
                                                  uint32_t slot, uint32_t full, int row,
                                                  int chunk) {
  fence_proxy_async();  // what lay there has been read
  __syncwarp();
  if (row == 0 && chunk == 0) {
    mbarrier_arrive_expecting(full, wide ? __popc(mask) / 4 * Traits::kRowBytes : 0);
  }
  if (!wide) return gather_raw<Traits>(address, wide, slot, row, chunk);
  const uint32_t to = slot + row * Traits::kRawRowBytes;
  const bool valid = address.valid();
  if (chunk == 0) {
    if (Traits::kHasScales) {
      copy_async_8(slot + 8 * Traits::kRawRowBytes + row * 8,
                   address.values() + address.to_scales(), valid ? 8 : 0);
    }
    if (valid) copy_bytes(to, address.values(), Traits::kRowBytes, full);
  }
  if (!valid) {
#pragma unroll 1
    for (int i = chunk; i < Traits::kRowBytes / 16; i += 4) store_shared_4(to + i * 16, 0, 0, 0, 0);
  }
  copy_async_commit();
}

/// Keys of this CTA's blocks, in passes; a warp has 8 rows of each pass.
template <typename Traits>
__device__ __forceinline__ void load_keys(const AttendSm90Args& args,
                                          ClusterStorage<Traits>& shared, int rank, int warp,
                                          int lane) {
  constexpr int kPasses = Traits::kKeyPasses, kPassRows = 8 * Traits::kKeyWarps;
  constexpr int kBatch = 4 / kPasses;  // blocks whose rows lanes find at a time
  const int row = lane >> 2, chunk = lane & 3, odd = row & 1;
  const RowFinder finder = row_finder(storage_base(shared), shared);
  const auto places = [&](int block) {
    const int pass = (lane >> 3) % kPasses, ahead = (lane >> 3) / kPasses;
    return finder.load(block + ahead * Traits::kCtas, pass * kPassRows + warp * 8 + (lane & 7));
  };
  const int num_blocks = shared.item.num_blocks;
  auto coming = places(rank);
  if (args.starts_early) wait_for_rows<Traits, 8 * kPasses>(finder, coming, lane);
  RowAddress found{};
  const uint32_t tile = shared_address(shared.keys[0]) + (warp * 8 + row) * 128;
  const uint32_t raw = shared_address(shared.raw_keys[warp]);
  // Round -1 only asks for the rows of round 0: all code is there once, as it is in no cache when
  // a call begins.
#pragma unroll 1
  for (int round = -1, block = rank - Traits::kCtas; block < num_blocks;
       ++round, block += Traits::kCtas) {
    if (round >= 0) {
      if (round == 0) mbarrier_poll(shared_address(&shared.query_taken), 0);
      if (round > 0) mbarrier_poll(shared_address(&shared.keys_empty[0]), phase_of<1>(round) ^ 1);
    }
    const int next = (round + 1) % kBatch;
    const RowAddress found_before = found;
    if (next == 0) {
      found = finder.address<Traits>(coming);
      coming = places(block + (kBatch + 1) * Traits::kCtas);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint32_t raw_slot = raw + pass * Traits::kRawKeyBytes;
      if (round >= 0) {
        const uint32_t keys = tile + pass * kPassRows * 128;
        if constexpr (Traits::kConverts) {
          copy_async_wait<kPasses - 1>();
          if (Traits::kKeysByCopyEngine) {
            mbarrier_poll(shared_address(&shared.raw_full[warp][pass]), phase_of<1>(round));
          }
          __syncwarp();
          const uint32_t unit = keys + ((2 * chunk ^ row) << 4);
          const PassAddresses<Traits> at = {raw_slot + row * Traits::kRawRowBytes + chunk * 16,
                                            raw_slot + 8 * Traits::kRawRowBytes + row * 8, unit,
                                            unit ^ 16};
          convert_pass<Traits>(
              at, keys + 7 * Traits::kPanelBytes + (((chunk + 4 * odd) ^ row) << 4), odd);
          __syncwarp();
        } else {
          const RowAddress address = address_of_lane(
              found_before, ((next + kBatch - 1) % kBatch * kPasses + pass) * 8 + row);
          const bool valid = address.valid();
          const std::byte* from = address.values() + chunk * 16;
          asm volatile("" : "+l"(from));  // one address register, immediate offsets
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            copy_async_stream(
                keys + (i >> 1) * Traits::kPanelBytes + ((((i & 1) * 4 + chunk) ^ row) << 4),
                from + i * 64, valid ? 16 : 0);
          }
        }
      }
      // The block is handed over before the last rows of the next one are asked for.
      if (round >= 0 && pass == kPasses - 1) {
        if constexpr (!Traits::kConverts) {
          copy_async_commit();
          copy_async_wait<0>();
        }
        fence_proxy_async();
        mbarrier_arrive(shared_address(&shared.keys_full[0]));
      }
      const RowAddress address = address_of_lane(found, (next * kPasses + pass) * 8 + row);
      const uint32_t mask = __ballot_sync(~0u, address.valid());
      if (lane == 0) shared.mask[(round + 1) & 1][pass * Traits::kKeyWarps + warp] = mask;
      if constexpr (Traits::kConverts) {
        if (block + Traits::kCtas >= num_blocks) {
          copy_async_commit();  // waits count passes
          continue;
        }
        if (Traits::kKeysByCopyEngine) {
          gather_whole_rows<Traits>(address, mask, args.wide_rows, raw_slot,
                                    shared_address(&shared.raw_full[warp][pass]), row, chunk);
        } else {
          gather_raw<Traits>(address, args.wide_rows, raw_slot, row, chunk);
        }
      }
    }
  }
}

/// For convert_exactly: the panels of a CTA are all there is.
template <typename Traits>
struct OwnPanels {
  static constexpr bool kHasScales = Traits::kHasScales;
  static constexpr int kFp8Columns = 64;
};
struct PanelAddresses {
  uint32_t raw, scales, unit0;

  __device__ __forceinline__ uint32_t unit(int /*panel*/, int upper) const {
    return unit0 ^ (upper << 4);
  }
};

/// The columns that this CTA sums, of the rows of all blocks. A warp has rows 8 warp ... of both
/// halves (passes) of a block, a quad of lanes one of each; a lane's share of 64 bytes is a unit.
template <typename Traits>
struct ValueLoader {
  static constexpr int kPanels = Traits::kValuePanels;
  static constexpr int kSlots = Traits::kRawValueSlots;
  static constexpr uint32_t kUnitBytes = 32 * 16;
  static constexpr uint32_t kPassBytes = Traits::kRawUnits * kUnitBytes;
  static constexpr uint32_t kSlotBytes = 4 * 2 * kPassBytes;
  static constexpr uint32_t kScaleSlotBytes = 4 * 2 * 8 * 8;
  static constexpr uint32_t kHalfTile = 32 * 128;

  const AttendSm90Args& args;
  int first_panel;
  bool rope;  // the last panel is the one that lies in the rows as bf16
  int row, chunk;
  uint32_t raw;     // of slot 0, pass 0, this lane
  uint32_t scales;  // of slot 0, pass 0, this row
  uint32_t line;    // of this row in values slot 0, pass 0

  /// Asks for the rows of a turn, whose addresses lanes `first` + 8 pass + row have found.
  __device__ __forceinline__ void gather(int slot, RowAddress found, int first) const {
    constexpr int kPasses = 2 * Traits::kTurnBlocks;
    constexpr int kUnits = Traits::kConverts ? kPanels : 2 * kPanels;
    const auto place = [&](int pass) {
      return (slot + pass / 2) * kSlotBytes + pass % 2 * kPassBytes;
    };
    if (Traits::kHasScales) {  // a lane those of one pass
      const int pass = chunk & (kPasses - 1);
      const RowAddress address = address_of_lane(found, first + pass * 8 + row);
      if (kPasses == 4 || chunk < kPasses) {
        copy_async_8(scales + (slot + pass / 2) * kScaleSlotBytes + pass % 2 * 64,
                     address.values() + address.to_scales(), address.valid() ? 8 : 0);
      }
    }
    RowAddress addresses[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      addresses[pass] = address_of_lane(found, first + pass * 8 + row);
    }
    const int column = first_panel * (Traits::kConverts ? 64 : 128) + chunk * 16;
    if (!Traits::kHasScales || args.wide_rows) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int bytes = addresses[pass].valid() ? 16 : 0;
        const std::byte* from = addresses[pass].values() + column;
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          copy_async_stream(raw + place(pass) + i * kUnitBytes, from + i * 64, bytes);
        }
        if (rope) {
          copy_async_stream(raw + place(pass) + kUnits * kUnitBytes, from + kUnits * 64, bytes);
        }
      }
    } else {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) {
        const RowAddress address = address_of_lane(found, first + pass * 8 + row);
        const int bytes = address.valid() ? 8 : 0;
        const std::byte* from = address.values() + column;
#pragma unroll 1
        for (int i = 0; i < kUnits + (rope ? 1 : 0); ++i) {
          copy_async_8(raw + place(pass) + i * kUnitBytes, from + i * 64, bytes);
          copy_async_8(raw + place(pass) + i * kUnitBytes + 8, from + i * 64 + 8, bytes);
        }
      }
    }
  }

  /// Where values 0-7 of a converted 16 go, and where the first of two units of bf16 does.
  __device__ __forceinline__ uint32_t converted_unit(int slot, int pass, int panel) const {
    return line + (slot * kPanels + panel) * Traits::kPanelBytes + pass * kHalfTile +
           ((2 * chunk ^ row) << 4);
  }
  __device__ __forceinline__ uint32_t plain_unit(int slot, int pass, int panel) const {
    return line + (slot * kPanels + panel) * Traits::kPanelBytes + pass * kHalfTile +
           (((chunk + 4 * (row & 1)) ^ row) << 4);
  }
  /// Scale bytes of this CTA's panels.
  __device__ __forceinline__ uint32_t load_scales(int raw_slot, int pass) const {
    if (!Traits::kHasScales) return 0x7f7f7f7fu;
    return load_shared(scales + raw_slot * kScaleSlotBytes + pass * 64 + (first_panel & 4)) >>
           (first_panel & 3) * 8;
  }

  /// All passes of a turn: what all of them read first, so that it comes together.
  __device__ __forceinline__ void convert(int raw_slot, int slot) const {
    constexpr int kPasses = 2 * Traits::kTurnBlocks;
    constexpr int kPassesAtOnce = kPanels > 1 ? 1 : kPasses;
    if (kPanels == 1 && rope) return copy_rope(raw_slot, slot);
    const uint32_t from = raw + raw_slot * kSlotBytes;
    const uint32_t odd_unit = (row & 1) * kUnitBytes;  // odd rows take the upper half first
    uint32_t unusual = 0;
#pragma unroll
    for (int pass0 = 0; pass0 < kPasses; pass0 += kPassesAtOnce) {
      uint4 x[kPassesAtOnce][kPanels], y[kPassesAtOnce];
      uint32_t of_panels[kPassesAtOnce];
#pragma unroll
      for (int p = 0; p < kPassesAtOnce; ++p) {
        const int block = (pass0 + p) >> 1, pass = (pass0 + p) & 1;
        const uint32_t at = from + block * kSlotBytes + pass * kPassBytes;
        of_panels[p] = load_scales(raw_slot + block, pass);
#pragma unroll
        for (int i = 0; i < kPanels; ++i) {
          const uint32_t swap = i == kPanels - 1 && rope ? odd_unit : 0;
          x[p][i] = load_shared_16(at + i * kUnitBytes + swap);
        }
        if (kPanels > 1 && rope) y[p] = load_shared_16(at + kPanels * kUnitBytes - odd_unit);
      }
#pragma unroll
      for (int p = 0; p < kPassesAtOnce; ++p) {
        const int block = (pass0 + p) >> 1, pass = (pass0 + p) & 1;
#pragma unroll
        for (int i = 0; i < kPanels; ++i) {
          const uint4 codes = x[p][i];
          if (kPanels > 1 && i == kPanels - 1 && rope) {
            const uint32_t to = plain_unit(slot + block, pass, i);
            store_shared_4(to, codes.x, codes.y, codes.z, codes.w);
            store_shared_4(to ^ 64, y[p].x, y[p].y, y[p].z, y[p].w);
            continue;
          }
          const uint32_t to = converted_unit(slot + block, pass, i);
          const uint32_t byte = of_panels[p] >> 8 * i & 0xff;
          const uint32_t scale = scale_operand(byte);
          uint32_t z[8];
          convert_4(codes.x, scale, z[0], z[1]);
          convert_4(codes.y, scale, z[2], z[3]);
          store_shared_4(to, z[0], z[1], z[2], z[3]);
          convert_4(codes.z, scale, z[4], z[5]);
          convert_4(codes.w, scale, z[6], z[7]);
          store_shared_4(to ^ 16, z[4], z[5], z[6], z[7]);
          unusual |= slow_scales(byte) | nan_codes(codes.x) | nan_codes(codes.y) |
                     nan_codes(codes.z) | nan_codes(codes.w);
        }
      }
    }
    if (__any_sync(~0u, (unusual & 0x80808080u) != 0)) {
#pragma unroll 1
      for (int block = 0; block < Traits::kTurnBlocks; ++block) {
        convert_again(raw_slot + block, slot + block);
      }
    }
  }

  /// Where the CTA's one panel is that of bf16 values.
  __device__ __forceinline__ void copy_rope(int raw_slot, int slot) const {
    const uint32_t odd_unit = (row & 1) * kUnitBytes;
#pragma unroll
    for (int i = 0; i < 2 * Traits::kTurnBlocks; ++i) {
      const uint32_t from = raw + (raw_slot + i / 2) * kSlotBytes + i % 2 * kPassBytes;
      const uint4 x = load_shared_16(from + odd_unit);
      const uint4 y = load_shared_16(from + kUnitBytes - odd_unit);
      const uint32_t to = plain_unit(slot + i / 2, i % 2, 0);
      store_shared_4(to, x.x, x.y, x.z, x.w);
      store_shared_4(to ^ 64, y.x, y.y, y.z, y.w);
    }
  }

  /// Rare: everything once more, exactly.
  __device__ __forceinline__ void convert_again(int raw_slot, int slot) const {
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const uint32_t of_panels = load_scales(raw_slot, pass);
      const uint32_t word = scales + raw_slot * kScaleSlotBytes + pass * 64;
#pragma unroll 1
      for (int i = 0; i < kPanels - (rope ? 1 : 0); ++i) {
        // convert_exactly looks for the scale of panel 0.
        __syncwarp();
        if (Traits::kHasScales && chunk == 0) store_shared(word, of_panels >> 8 * i & 0xff);
        __syncwarp();
        convert_exactly<OwnPanels<Traits>>(
            PanelAddresses{raw + raw_slot * kSlotBytes + pass * kPassBytes + i * kUnitBytes, word,
                           converted_unit(slot, pass, i)});
      }
    }
  }

  /// bf16 rows.
  __device__ __forceinline__ void copy(int raw_slot, int slot) const {
    const uint32_t odd_unit = (row & 1) * kUnitBytes;
#pragma unroll
    for (int p = 0; p < 2 * Traits::kTurnBlocks; ++p) {
      const uint32_t from = raw + (raw_slot + p / 2) * kSlotBytes + p % 2 * kPassBytes;
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const uint4 x = load_shared_16(from + 2 * i * kUnitBytes + odd_unit);
        const uint4 y = load_shared_16(from + (2 * i + 1) * kUnitBytes - odd_unit);
        const uint32_t to = plain_unit(slot + p / 2, p % 2, i);
        store_shared_4(to, x.x, x.y, x.z, x.w);
        store_shared_4(to ^ 64, y.x, y.y, y.z, y.w);
      }
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void load_values(const AttendSm90Args& args,
                                            ClusterStorage<Traits>& shared, int rank, int group,
                                            int warp, int lane) {
  constexpr int kSlots = Traits::kRawValueSlots, kGroups = Traits::kValueGroups;
  constexpr int kTurn = Traits::kTurnBlocks, kStep = kTurn * kGroups;
  constexpr int kAhead = kSlots / kTurn;  // turns under way
  const uint32_t base = storage_base(shared);
  const auto at = [&](const void* member) { return member_address(base, shared, member); };
  const int num_blocks = shared.item.num_blocks;
  const ValueLoader<Traits> loader{
      args,
      rank * Traits::kValuePanels,
      Traits::kHasScales && rank == Traits::kCtas - 1,
      lane >> 2,
      lane & 3,
      at(&shared.raw_values) + group * kSlots * ValueLoader<Traits>::kSlotBytes +
          warp * 2 * ValueLoader<Traits>::kPassBytes + lane * 16,
      at(&shared.raw_scales) + group * kSlots * ValueLoader<Traits>::kScaleSlotBytes + warp * 128 +
          (lane >> 2) * 8,
      at(&shared.values) + (warp * 8 + (lane >> 2)) * 128};
  const RowFinder finder = row_finder(base, shared);
  // Lanes find the rows of two of the group's blocks at a time.
  const int finds_row = (lane >> 3 & 1) * 32 + warp * 8 + (lane & 7);
  const auto places = [&](int block) {
    return finder.load(block + (lane >> 4) * (kTurn == 2 ? 1 : kGroups), finds_row);
  };
  auto coming = places(group * kTurn);
  if (args.starts_early) sm90::wait_for_kernels_before();
  RowAddress found{};

  int slot = group * kTurn, raw_slot = 0;
  uint32_t phase = 1;  // of the uses of a slot: the first one is free
  // Negative turns: only the gathering. A block past the last one is masked, and nobody reads it.
#pragma unroll 1
  for (int turn = -kAhead, block = group * kTurn - kAhead * kStep; block < num_blocks;
       ++turn, block += kStep) {
    if (turn >= 0) {
      if (turn == 0) mbarrier_poll(at(&shared.query_taken), 0);
      // Slots are given back in their order.
      if (block >= Traits::kValueSlots) {
        mbarrier_poll(at(&shared.values_empty) + (slot + kTurn - 1) * 8, phase);
      }
      copy_async_wait<kAhead - 1>();
      __syncwarp();
      if constexpr (Traits::kConverts) {
        loader.convert(raw_slot, slot);
      } else {
        loader.copy(raw_slot, slot);
      }
      fence_proxy_async();
#pragma unroll
      for (int i = 0; i < kTurn; ++i) mbarrier_arrive(at(&shared.values_full) + (slot + i) * 8);
      slot += kStep;
      if (slot >= Traits::kValueSlots) {
        slot -= Traits::kValueSlots;
        phase ^= 1;
      }
      __syncwarp();
    }
    const int odd = kTurn == 1 ? (turn + kSlots) & 1 : 0;
    if (odd == 0) {
      found = finder.address<Traits>(coming);
      coming = places(block + kAhead * kStep + 2 * kGroups);
    }
    loader.gather(raw_slot, found, odd * 16);
    copy_async_commit();
    raw_slot = raw_slot == kSlots - kTurn ? 0 : raw_slot + kTurn;
  }
}

}  // namespace dsv4::nvidia::sm90_attend
