// Writers of one cache row from the registers of a lane group, one type per format; bytes as
// cache/kv_format.h defines them. All formats but f32 round to bf16 first. A tile or row with a NaN
// or infinity gets a NaN scale, so that the fault stays visible. Pages start at multiples of 8
// bytes.
//
// `kVectorsAlone`: vectors of a row need nothing of each other, and store<kGroups> takes a row that
// is spread over the groups of the block.
#pragma once
#include "backends/gpu/row.h"

namespace dsv4::gpu {

/// A paged cache as kernels see it (CacheView).
struct CachePages {
  uint8_t* base;
  int64_t block_stride_bytes;
  int32_t rows_per_block;
  int32_t row_elems;
};

struct CacheRowAddress {
  uint8_t* values;
  uint8_t* scales;
};
/// All values of a page come first, then the scales of all rows.
DSV4_DEVICE CacheRowAddress cache_row_at(const CachePages& pages, int64_t slot, int value_bytes,
                                         int scale_bytes) {
  // A 64-bit division is a long subroutine; slots of 32 bits need none.
  const auto rows = static_cast<uint32_t>(pages.rows_per_block);
  const int64_t block = (slot >> 32) == 0 ? static_cast<uint32_t>(slot) / rows : slot / rows;
  const int64_t row = slot - block * pages.rows_per_block;
  uint8_t* page = pages.base + block * pages.block_stride_bytes;
  return {page + row * value_bytes,
          page + int64_t{pages.rows_per_block} * value_bytes + row * scale_bytes};
}

/// E4M3 codes of a lane's pair, the even one in the low byte; NaN is 0x7f.
constexpr uint32_t kE4m3NanPair = 0x7f7f;
DSV4_DEVICE void store_codes(uint8_t* to, uint32_t codes) {
  store_as(to, static_cast<uint16_t>(codes));
}

struct F32Rows {
  static constexpr bool kVectorsAlone = true;
  template <int kGroups = 1, int kVectors>
  DSV4_DEVICE static void store(const CachePages& pages, int64_t slot, const Row<kVectors>& row) {
    const int n = pages.row_elems;
    store_row<Access::kPairs, kGroups>(
        reinterpret_cast<float*>(cache_row_at(pages, slot, 4 * n, 0).values), n, row);
  }
};

struct Bf16Rows {
  static constexpr bool kVectorsAlone = true;
  template <int kGroups = 1, int kVectors>
  DSV4_DEVICE static void store(const CachePages& pages, int64_t slot, const Row<kVectors>& row) {
    const int n = pages.row_elems;
    store_row<Access::kPairs, kGroups>(
        reinterpret_cast<Bf16*>(cache_row_at(pages, slot, 2 * n, 0).values), n, row);
  }
};

/// E4M3 with the scale 1 of a whole cache.
struct Fp8Rows {
  static constexpr bool kVectorsAlone = true;
  template <int kGroups = 1, int kVectors>
  DSV4_DEVICE static void store(const CachePages& pages, int64_t slot, const Row<kVectors>& row) {
    const int n = opaque(pages.row_elems);
    uint8_t* codes = cache_row_at(pages, slot, n, 0).values;
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int elem = row_elem<kGroups>(i);
      if (elem < n)
        store_codes(codes + elem, uint32_t{to_e4m3(bf16_value(row.even[i]))} |
                                      uint32_t{to_e4m3(bf16_value(row.odd[i]))} << 8);
    }
  }
};

/// Seven tiles of 64 E4M3 with a UE8M0 scale each, then 64 bf16: a vector of the row is a tile.
struct Fp8DsMlaRows {
  static constexpr bool kVectorsAlone = true;
  static constexpr int kTiles = 7, kNopeDim = 448, kValueBytes = 576, kScaleBytes = 8;

  template <int kGroups = 1, int kVectors>
  DSV4_DEVICE static void store(const CachePages& pages, int64_t slot, Row<kVectors> row) {
    static_assert(kNopeDim == kTiles * kVectorElems && kVectors * kGroups == kTiles + 1);
    const CacheRowAddress at = cache_row_at(pages, slot, kValueBytes, kScaleBytes);
    round_row_to_bf16(row);
    uint32_t scale_byte = 0;  // of a whole row: lane i stores that of tile i; the eighth is zero
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int tile = kGroups == 1 ? i : i * kGroups + group_idx();
      const float amax = float_of(group_max(max_magnitude(row, i)));
      if (tile == kTiles) {
        store_pair(reinterpret_cast<Bf16*>(at.values + kNopeDim) + 2 * group_lane(),
                   {row.even[i], row.odd[i]});
        if (kGroups > 1 && group_lane() == 0) at.scales[tile] = 0;
        continue;
      }
      const Scale scale = scale_for(amax, kFp8AmaxFloor, kE4m3Max);
      if (kGroups > 1) {
        if (group_lane() == 0) at.scales[tile] = e8m0_of(scale);
      } else {
        if (group_lane() == i) scale_byte = e8m0_of(scale);
      }
      const uint32_t codes = pack_e4m3(row.even[i] * scale.inverse, row.odd[i] * scale.inverse);
      store_codes(at.values + tile * kVectorElems + 2 * group_lane(),
                  is_finite(amax) ? codes : kE4m3NanPair);
    }
    if (kGroups == 1 && group_lane() < kScaleBytes)
      at.scales[group_lane()] = static_cast<uint8_t>(scale_byte);
  }
};

/// E4M3 with one float scale, a power of two.
struct IndexFp8Rows {
  static constexpr bool kVectorsAlone = false;
  template <int kVectors>
  DSV4_DEVICE static void store(const CachePages& pages, int64_t slot, Row<kVectors> row) {
    const int n = pages.row_elems;
    const CacheRowAddress at = cache_row_at(pages, slot, n, sizeof(float));
    round_row_to_bf16(row);
    uint32_t largest = 0;
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t here = max_magnitude(row, i);
      largest = largest < here ? here : largest;
    }
    const float amax = float_of(group_max(largest));
    const Scale scale = scale_for(amax, kFp8AmaxFloor, kE4m3Max);
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int elem = row_elem(i);
      if (elem >= n) continue;
      const uint32_t codes = pack_e4m3(row.even[i] * scale.inverse, row.odd[i] * scale.inverse);
      store_codes(at.values + elem, is_finite(amax) ? codes : kE4m3NanPair);
    }
    if (group_lane() == 0) store_as(at.scales, scale.value);
  }
};

/// The largest over a block of 32 elements: half of the lanes.
DSV4_DEVICE uint32_t half_group_max(uint32_t value) {
  for (int distance = kGroupLanes / 4; distance > 0; distance /= 2) {
    const uint32_t other = shuffle_xor(value, distance);
    value = value < other ? other : value;
  }
  return value;
}

/// Pairs of E2M1 in a byte, a UE8M0 scale for every 32.
struct IndexMxfp4Rows {
  static constexpr bool kVectorsAlone = false;
  static constexpr int kBlockElems = 32;

  template <int kVectors>
  DSV4_DEVICE static void store(const CachePages& pages, int64_t slot, Row<kVectors> row) {
    const int n = pages.row_elems;
    const CacheRowAddress at = cache_row_at(pages, slot, n / 2, n / kBlockElems);
    round_row_to_bf16(row);
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const float amax = float_of(half_group_max(max_magnitude(row, i)));
      const int elem = row_elem(i);
      if (elem >= n) continue;
      const Scale scale = scale_for(amax, kMxfp4AmaxFloor, kE2m1Max);
      uint32_t codes = 0x77;
      if (is_finite(amax)) {
        codes = e2m1_code(round_to_e2m1(row.even[i] * scale.inverse)) |
                e2m1_code(round_to_e2m1(row.odd[i] * scale.inverse)) << 4;
      }
      at.values[elem / 2] = static_cast<uint8_t>(codes);
      if (elem % kBlockElems == 0) at.scales[elem / kBlockElems] = e8m0_of(scale);
    }
  }
};

}  // namespace dsv4::gpu
