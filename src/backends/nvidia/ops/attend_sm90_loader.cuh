// The loader role of sm90_attend: gathers the rows of a block, whose addresses the walk has found
// (attend_sm90_walk.cuh), and writes them as bf16 into the tile of a stage. Four warps; each owns 8
// rows of either half of a block, so that nothing is handed over inside the role.
#pragma once
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/ops/attend_sm90_walk.cuh"

namespace dsv4::nvidia::sm90_attend {

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

/// FP8 rows, in passes of half a block: gathered three passes ahead into the raw ring, then
/// converted. A block is handed over before new rows are asked for, because others wait for it.
/// What a pass reads from shared memory is asked for half a pass earlier: there is one warp per
/// scheduler, and nobody else to fill the time.
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
    if (lane == 0) shared.mask[stage][half * 4 + warp] = masks[0];

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
