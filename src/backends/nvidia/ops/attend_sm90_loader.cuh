// The loader role of sm90_attend: gathers the rows of a block, whose addresses the walk has found
// (attend_sm90_walk.cuh), and writes them as bf16 into the tile of a stage. Four warps; each owns 8
// rows of either half of a block, so that nothing is handed over inside the role. The first part is
// what loaders of clusters share (attend_sm90_cluster_loader.cuh).
#pragma once
#include <cuda_fp16.h>

#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/ops/attend_sm90_walk.cuh"

namespace dsv4::nvidia::sm90_attend {

// ---- E4M3 to bf16 by passes of 8 rows a warp

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
    convert_panel(at, i, raw[i], i < 4 ? scales.x : scales.y);
    unusual |= nan_codes(raw[i]);
  }
  if (Traits::kHasScales) {
    store_shared_4(rope_unit, rope[0].x, rope[0].y, rope[0].z, rope[0].w);
    store_shared_4(rope_unit ^ 64, rope[1].x, rope[1].y, rope[1].z, rope[1].w);
  }
  if (__any_sync(~0u, (unusual & 0x80808080u) != 0)) convert_exactly<Traits>(at);
}

// ---- The role

/// Four codes as two pairs of bf16, through f32: that takes half of what the integer pipe has to do
/// for the bits themselves, and NaN codes and all scales come out right.
template <typename Traits>
__device__ __forceinline__ void convert_by_f32(uint32_t codes, uint32_t scale, uint32_t& low,
                                               uint32_t& high) {
  uint32_t pairs[2];
  e4m3x4_to_f16x4(codes, pairs[0], pairs[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const __half2 pair = *reinterpret_cast<const __half2*>(&pairs[i]);
    const uint32_t values = pack_bf16x2(__low2float(pair), __high2float(pair));
    (i == 0 ? low : high) = Traits::kHasScales ? multiply_bf16x2(values, scale) : values;
  }
}
/// 2^(byte - 127) of a panel in both halves, NaN for byte 255.
__device__ __forceinline__ uint32_t scale_of_panel(const uint2& bytes, int panel) {
  const uint32_t four = __byte_perm(bytes.x, bytes.y, panel * 0x1111);
  const uint32_t scale = __vmaxu2(four >> 1 & 0x7f807f80u, 0x00400040u);
  return multiply_add_bf16x2(scale, 0, scale);  // infinity x 0
}

/// Before the rows of the first two blocks are read: they are on their way to the L2 while the
/// kernels before end, which write there, too. `address(block, r)`: of a row of 4 lanes. In a loop:
/// where lists are waited for, this code stands between others that are in no cache.
template <typename Traits, typename Address>
__device__ __forceinline__ void wait_for_rows(const Address& address, int lane) {
#pragma unroll 1
  for (int i = 0; i < 4; ++i) prefetch_row<Traits>(address(i / 2, i % 2), lane);
  sm90::wait_for_kernels_before();
}

/// FP8 rows, panel by panel. A lane has 16 columns of every panel of rows lane / 4 and 32 + lane /
/// 4 of its warp's: it converts what it has copied itself. bf16 values are copied straight into the
/// tile. Panels 0-3 are handed over before 4-7 are converted.
template <typename Traits, bool kWide>
__device__ __forceinline__ void load_and_convert(const AttendSm90Args& args,
                                                 SharedStorage<Traits>& shared, int warp,
                                                 int lane) {
  constexpr int kPanels = Traits::kFp8Panels, kRing = Traits::kRing;
  static_assert(kRing < kPanels);  // so that no more than the next block is asked for
  constexpr int kTileBytes = Traits::kPanels * Traits::kPanelBytes;
  const int row = lane >> 2, chunk = lane & 3;
  const uint32_t tile_row = shared_address(shared.rows) + (warp * 8 + row) * 128;
  const uint32_t unit = tile_row + ((2 * chunk ^ row) << 4);
  const uint32_t raw = shared_address(shared.raw[warp]) + lane * 16;
  const uint32_t scales = shared_address(shared.scales[warp]) + row * 8;
  const uint32_t addresses = shared_address(shared.walk.addresses[warp]) + row * 8;
  const auto address = [&](int slot, int r) {
    const uint2 bits = load_shared_2(addresses + (slot * 16 + r * 8) * 8);
    return RowAddress{static_cast<uint64_t>(bits.y) << 32 | bits.x};
  };
  const auto next_slot = [](int slot) { return slot == Traits::kAddressSlots - 1 ? 0 : slot + 1; };
  const auto copy = [](uint32_t to, const std::byte* from, bool valid) {
    if (kWide) {
      copy_async_stream(to, from, valid ? 16 : 0);
    } else {
      copy_async_8(to, from, valid ? 8 : 0);
      copy_async_8(to + 8, from + 8, valid ? 8 : 0);
    }
  };

  // The block that is fetched: this lane's chunk of its rows, its slot of addresses, its parity.
  const std::byte* from[2];
  bool valid[2];
  int fetched = 0, parity = 0;
  const auto open_block = [&] {
    __syncwarp();  // all have read the scales whose place is taken
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowAddress found = address(fetched, r);
      valid[r] = found.valid();
      from[r] = found.values() + chunk * 16;
      if (Traits::kHasScales && chunk == r) {
        copy_async_8(scales + parity * 128 + r * 64, found.values() + found.to_scales(),
                     valid[r] ? 8 : 0);
      }
      // bf16 values, which are copied last.
      if (Traits::kHasScales && valid[r]) {
        prefetch_l2(found.values() + Traits::kFp8Columns + chunk * 32);
      }
    }
    fetched = next_slot(fetched);
    parity ^= 1;
  };
  // Panels are copied in groups of one.
  const auto fetch = [&](int panel, uint32_t to) {
    if (panel == 0) open_block();
#pragma unroll
    for (int r = 0; r < 2; ++r) copy(to + r * 512, from[r] + panel * 64, valid[r]);
    copy_async_commit();
  };
  const auto unit_after = [&](uint32_t at) {
    return at == raw + (kRing - 1) * Traits::kUnitBytes ? raw : at + Traits::kUnitBytes;
  };

  mbarrier_poll(shared_address(&shared.barriers.blocks_known[0]), 0);
  if (args.starts_early) wait_for_rows<Traits>(address, chunk);
#pragma unroll
  for (int i = 0; i < kRing; ++i) fetch(i, raw + i * Traits::kUnitBytes);
  int token = shared.walk.headers[0].token;
  mbarrier_poll(shared_address(&shared.barriers.blocks_known[1]), 0);

  uint32_t at = raw;
  int here = 0;  // slot of the addresses of the block that is converted
#pragma unroll 1
  for (int block = 0; token >= 0; ++block) {
    const int stage = block & 1;
    const uint32_t phase = phase_of<2>(block) ^ 1;
    uint4 codes[2][2];
    const auto load = [&](int panel, uint32_t unit_at) {
#pragma unroll
      for (int r = 0; r < 2; ++r) codes[panel & 1][r] = load_shared_16(unit_at + r * 512);
    };
    copy_async_wait<kRing - 1>();
    __syncwarp();  // scales come through other lanes
    uint2 scales_of[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (Traits::kHasScales) scales_of[r] = load_shared_2(scales + stage * 128 + r * 64);
    }
    load(0, at);
    if (block > 1) mbarrier_poll(shared_address(&shared.barriers.rows_empty[stage][0]), phase);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t mask = __ballot_sync(~0u, address(here, r).valid());
      if (lane == 0) shared.mask[stage][r * 4 + warp] = mask;
    }

#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint32_t next = unit_after(at);
      if (panel + 1 < kPanels) {
        copy_async_wait<kRing - 2>();
        load(panel + 1, next);
      }
      const uint32_t to = unit + stage * kTileBytes + panel * Traits::kPanelBytes;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 x = codes[panel & 1][r];
        const uint32_t scale = Traits::kHasScales ? scale_of_panel(scales_of[r], panel) : 0;
        uint32_t y[8];
        convert_by_f32<Traits>(x.x, scale, y[0], y[1]);
        convert_by_f32<Traits>(x.y, scale, y[2], y[3]);
        store_shared_4(to + r * 32 * 128, y[0], y[1], y[2], y[3]);
        convert_by_f32<Traits>(x.z, scale, y[4], y[5]);
        convert_by_f32<Traits>(x.w, scale, y[6], y[7]);
        store_shared_4((to ^ 16) + r * 32 * 128, y[4], y[5], y[6], y[7]);
      }
      if (panel == 3) {
        mbarrier_arrive(shared_address(&shared.barriers.rows_full[stage][0]));
        if (block > 1) mbarrier_poll(shared_address(&shared.barriers.rows_empty[stage][1]), phase);
#pragma unroll
        for (int r = 0; r < (Traits::kHasScales ? 2 : 0); ++r) {
          const RowAddress found = address(here, r);
          const std::byte* values = found.values() + Traits::kFp8Columns + chunk * 16;
          const uint32_t values_at =
              tile_row + stage * kTileBytes + 7 * Traits::kPanelBytes + r * 32 * 128;
          copy(values_at + ((chunk ^ row) << 4), values, found.valid());
          copy(values_at + (((chunk + 4) ^ row) << 4), values + 64, found.valid());
        }
        here = next_slot(here);
      }
      if (panel == kPanels - 1) {
        if (Traits::kHasScales) copy_async_wait<kPanels - 5>();  // bf16 values
        mbarrier_arrive(shared_address(&shared.barriers.rows_full[stage][1]));
      }
      fetch((panel + kRing) % kPanels, at);
      at = next;
    }
    token = shared.walk.headers[(block + 1) % Traits::kHeaderSlots].token;
  }
  copy_async_wait<0>();
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
  if (args.starts_early) wait_for_rows<Traits>(address, chunk);
  int here = 0;
  for (int block = 0; shared.walk.headers[block % Traits::kHeaderSlots].token >= 0; ++block) {
    const int stage = block & 1;
    const int next = here == Traits::kAddressSlots - 1 ? 0 : here + 1;
    if (block > 1) {
      mbarrier_poll(shared_address(&shared.barriers.rows_empty[stage][0]), phase_of<2>(block) ^ 1);
      mbarrier_poll(shared_address(&shared.barriers.rows_empty[stage][1]), phase_of<2>(block) ^ 1);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
        const RowAddress found = address(here, pass);
        const bool valid = found.valid();
        const uint32_t mask = __ballot_sync(~0u, valid);
        if (lane == 0) shared.mask[stage][pass * 4 + warp] = mask;
        const std::byte* from = found.values() + chunk * 16 + half * 512;
        asm volatile("" : "+l"(from));  // one address register, immediate offsets
        const uint32_t to =
            tile_row + (stage * Traits::kPanels + half * 4) * Traits::kPanelBytes + pass * 32 * 128;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          copy_async_stream(
              to + (i >> 1) * Traits::kPanelBytes + ((((i & 1) * 4 + chunk) ^ row) << 4),
              from + i * 64, valid ? 16 : 0);
        }
      }
      copy_async_commit();
    }
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const RowAddress coming = address(next, pass);
      if (coming.valid()) {
        prefetch_l2(coming.values() + chunk * 256);
        prefetch_l2(coming.values() + chunk * 256 + 128);
      }
    }
    here = next;
    copy_async_wait<1>();
    mbarrier_arrive(shared_address(&shared.barriers.rows_full[stage][0]));
    copy_async_wait<0>();
    mbarrier_arrive(shared_address(&shared.barriers.rows_full[stage][1]));
  }
}

}  // namespace dsv4::nvidia::sm90_attend
