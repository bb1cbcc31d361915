// The loader of sm90_attend_cluster in clusters of 2: a CTA converts the rows of its own blocks
// only, and the copy engine takes the other one's columns of them to it.
#pragma once
#include "backends/nvidia/ops/attend_sm90_cluster_loader.cuh"

namespace dsv4::nvidia::sm90_attend {

/// A thread's share of a row of keys: 16 bytes of every 64.
template <typename Traits>
struct RawKeys {
  static constexpr int kPanels = Traits::kFp8Columns / 64;
  uint4 codes[kPanels], rope[2];
  uint2 scales = {0x7f7f7f7fu, 0x7f7f7f7fu};

  __device__ __forceinline__ void load(const PassAddresses<Traits>& at, int odd) {
    if (Traits::kHasScales) scales = load_shared_2(at.scales);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) codes[i] = load_shared_16(at.raw + i * 64);
    if (Traits::kHasScales) {  // odd rows take the upper half first: no bank conflict
      rope[0] = load_shared_16(at.raw + 448 + odd * 64);
      rope[1] = load_shared_16(at.raw + 512 - odd * 64);
    }
  }
  /// Of any lane: what convert_exactly must do.
  __device__ __forceinline__ bool unusual() const {
    uint32_t bits = slow_scales(scales.x) | slow_scales(scales.y);
#pragma unroll
    for (const uint4& x : codes) bits |= nan_codes(x);
    return __any_sync(~0u, (bits & 0x80808080u) != 0);
  }
  __device__ __forceinline__ void convert(const PassAddresses<Traits>& at,
                                          uint32_t rope_unit) const {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) convert_panel(at, i, codes[i], i < 4 ? scales.x : scales.y);
    if (Traits::kHasScales) {
      store_shared_16(rope_unit, rope[0]);
      store_shared_16(rope_unit ^ 64, rope[1]);
    }
  }
};

/// Sends to the other CTA of two its columns of a block, when all rows of the block are there and
/// the other one has read those of the block before. By one warp, which does not wait for that if
/// it can do something else.
template <typename Traits>
struct ValueSender {
  ClusterStorage<Traits>& shared;
  int rank, lane;
  int round = -1;  // of the block that has not been sent; -1: none

  __device__ __forceinline__ void try_send() {
    if (round < 0) return;
    const int stage = round & 1, other = rank ^ 1;
    const bool can = mbarrier_test(shared_address(&shared.keys_full[stage]), phase_of<2>(round)) &&
                     (round == 0 || mbarrier_test(shared_address(&shared.values_empty[0]),
                                                  phase_of<1>(round) ^ 1));
    if (!__all_sync(~0u, can)) return;
    if (lane == 0) {
      cluster_copy_async(cluster_address(shared.values[0], other),
                         shared_address(shared.keys[stage][other * Traits::kValuePanels]),
                         sizeof(shared.values[0]), cluster_address(&shared.values_full[0], other));
    }
    __syncwarp();
    round = -1;
  }
  __device__ __forceinline__ void send() {
    while (round >= 0) try_send();
  }
  /// Waits for a barrier.
  __device__ __forceinline__ void poll(uint32_t barrier, uint32_t parity) {
    while (round >= 0 && !__all_sync(~0u, mbarrier_test(barrier, parity))) try_send();
    mbarrier_poll(barrier, parity);
  }
};

/// Keys of this CTA's blocks where the other one gets its columns of them as values: two stages. A
/// warp has 8 rows, and finds them, of four blocks at a time.
template <typename Traits>
__device__ __forceinline__ void load_keys_of_pair(const AttendSm90Args& args,
                                                  ClusterStorage<Traits>& shared, int rank,
                                                  int warp, int lane) {
  constexpr int kCtas = Traits::kCtas;
  const int row = lane >> 2, chunk = lane & 3, odd = row & 1;
  const uint32_t base = storage_base(shared);
  const auto at = [&](const void* member) { return member_address(base, shared, member); };
  const RowFinder finder = row_finder(base, shared);
  const int num_blocks = shared.item.num_blocks;
  const auto places = [&](int round) {
    return finder.load((round + (lane >> 3)) * kCtas + rank, warp * 8 + (lane & 7));
  };
  const uint32_t raw = at(shared.raw_keys[warp]);
  auto coming = places(0);
  if (args.starts_early) wait_for_rows<Traits, 8>(finder, coming, lane);
  RowAddress found{};
  uint32_t mask = 0;
  ValueSender<Traits> sender{shared, rank, lane};  // of warp 0
#pragma unroll 1
  for (int round = -1; round * kCtas + rank < num_blocks; ++round) {
    const int next = round + 1;
    const bool more = next * kCtas + rank < num_blocks;
    if ((next & 3) == 0) {
      found = finder.address<Traits>(coming);
      coming = places(next + 4);
    }
    const RowAddress address = address_of_lane(found, (next & 3) * 8 + row);
    const auto empty_stage = [&](int of_round) {
      if (of_round == 0) mbarrier_poll(at(&shared.query_taken), 0);
      if (of_round >= 2) {
        sender.poll(at(&shared.keys_empty[of_round & 1]), phase_of<2>(of_round) ^ 1);
      }
    };
    const auto tile = [&](int of_round) {
      return at(shared.keys[of_round & 1]) + (warp * 8 + row) * 128;
    };
    const auto store_mask = [&](int of_round, uint32_t words) {
      if (lane == 0) shared.mask[of_round & 1][warp] = words;
    };
    if constexpr (Traits::kConverts) {
      const auto gather = [&] {
        if (more) gather_raw<Traits>(address, args.wide_rows, raw, row, chunk);
      };
      const uint32_t mask_here = mask;
      mask = __ballot_sync(~0u, address.valid());
      if (round < 0) {
        gather();
        continue;
      }
      sender.try_send();
      copy_async_wait<0>();
      __syncwarp();
      const uint32_t unit = tile(round) + ((2 * chunk ^ row) << 4);
      const PassAddresses<Traits> to = {raw + row * Traits::kRawRowBytes + chunk * 16,
                                        raw + 8 * Traits::kRawRowBytes + row * 8, unit, unit ^ 16};
      RawKeys<Traits> keys;
      keys.load(to, odd);
      const bool unusual = keys.unusual();  // all lanes have read
      if (!unusual) gather();
      sender.try_send();
      empty_stage(round);
      store_mask(round, mask_here);
      keys.convert(to, tile(round) + 7 * Traits::kPanelBytes + (((chunk + 4 * odd) ^ row) << 4));
      if (unusual) {
        convert_exactly<Traits>(to);
        __syncwarp();
        gather();
      }
    } else {
      if (more) {
        empty_stage(next);
        store_mask(next, __ballot_sync(~0u, address.valid()));
        const bool valid = address.valid();
        const std::byte* from = address.values() + chunk * 16;
        asm volatile("" : "+l"(from));  // one address register, immediate offsets
        const uint32_t keys = tile(next);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          copy_async_stream(
              keys + (i >> 1) * Traits::kPanelBytes + ((((i & 1) * 4 + chunk) ^ row) << 4),
              from + i * 64, valid ? 16 : 0);
        }
      }
      copy_async_commit();
      if (round < 0) continue;
      copy_async_wait<1>();
    }
    fence_proxy_async();
    mbarrier_arrive(at(&shared.keys_full[round & 1]));
    sender.send();
    if (warp == 0) sender.round = round;
    sender.try_send();
  }
  sender.send();
}

}  // namespace dsv4::nvidia::sm90_attend
