// Row formats of the KV caches, byte by byte: sizes, addresses, and a plain encoder and decoder of
// one row. The scalar definition that every kernel agrees with; also the writer of CPU serving.
// Source: spec/cache_layouts.md 1, 3, 5.
//
// Every format has the same shape: a page of `rows` rows holds the values of all rows first, then
// the scales of all rows.
//
//   format        values of a row                    scales of a row
//   fp8_ds_mla    448 E4M3 + 64 bf16 = 576 B         7 UE8M0 (tiles of 64) + one zero byte = 8 B
//   bf16          row_elems bf16                     -
//   fp8           row_elems E4M3                     - (one scale per cache, outside of it)
//   f32           row_elems float                    -
//   index_fp8     row_elems E4M3                     one float, a power of two = 4 B
//   index_mxfp4   row_elems / 2 B, E2M1 pairs,       row_elems / 32 UE8M0
//                 the even element in the low nibble
//   index_f32, state_f32: as f32
#pragma once
#include <cstddef>
#include <cstdint>

#include "dsv4/cache.h"

namespace dsv4 {

/// The packed row of DeepSeek-V4 (FlashMLA: MODEL1). Defined for this head size only.
struct Fp8DsMla {
  static constexpr int kHeadDim = 512;
  static constexpr int kNopeDim = 448;
  static constexpr int kRopeDim = 64;
  static constexpr int kTileElems = 64;
  static constexpr int kTiles = kNopeDim / kTileElems;
  static constexpr int kRopeOffsetBytes = kNopeDim;
  static constexpr int kValueBytes = kNopeDim + 2 * kRopeDim;
  static constexpr int kScaleBytes = kTiles + 1;
  static constexpr int kRowBytes = kValueBytes + kScaleBytes;
};
static_assert(Fp8DsMla::kRowBytes == 584);

/// Elements that share a UE8M0 scale in index_mxfp4.
constexpr int kMxfp4BlockElems = 32;
/// Floors of amax: the smallest scale byte of a zero tile is 105 (FP8), 1 (MXFP4).
constexpr float kFp8AmaxFloor = 1e-4f;
constexpr float kMxfp4AmaxFloor = 6 * 0x1p-126f;

/// Bytes of one row in the value area and in the scale area of its page.
struct RowLayout {
  int64_t value_bytes = 0;
  int64_t scale_bytes = 0;
  constexpr int64_t row_bytes() const { return value_bytes + scale_bytes; }
};

/// Layout of a row; `row_elems` must fit the format (check_row_elems).
constexpr RowLayout row_layout(KvFormat format, int row_elems) {
  const int64_t n = row_elems;
  switch (format) {
    case KvFormat::kFp8DsMla:
      return {Fp8DsMla::kValueBytes, Fp8DsMla::kScaleBytes};
    case KvFormat::kBf16:
      return {2 * n, 0};
    case KvFormat::kFp8:
      return {n, 0};
    case KvFormat::kIndexFp8:
      return {n, 4};
    case KvFormat::kIndexMxfp4:
      return {n / 2, n / kMxfp4BlockElems};
    case KvFormat::kF32:
    case KvFormat::kIndexF32:
    case KvFormat::kStateF32:
      return {4 * n, 0};
  }
  return {};
}

/// @throws Error kInvalidArgument: fp8_ds_mla with row_elems != 512, index_mxfp4 with row_elems not
/// a multiple of 32, row_elems < 1.
void check_row_elems(KvFormat format, int row_elems);

/// Page size of a system that aligns pages to whole rows of its packed cache: 576 where the model
/// uses fp8_ds_mla, 512 with plain rows. @throws as page_bytes, and for alignment < 1.
int64_t upstream_page_bytes(KvFormat format, int64_t rows, int row_elems, int64_t alignment = 576);

// ---- addresses
// -----------------------------------------------------------------------------------------------

/// Where one row lives. `scales` is meaningful only where the format has scales.
struct RowAddress {
  std::byte* values;
  std::byte* scales;
};

inline std::byte* block_pointer(const CacheView& view, int64_t block) {
  return view.base + block * view.block_stride_bytes;
}
/// Row `row` of the page at `page` that has `rows` rows.
inline RowAddress row_in_page(std::byte* page, int64_t rows, int64_t row, RowLayout layout) {
  return {page + row * layout.value_bytes,
          page + rows * layout.value_bytes + row * layout.scale_bytes};
}
/// `slot` = block * rows_per_block + row. All arithmetic is 64-bit: slot * 576 passes 2^31.
inline RowAddress row_address(const CacheView& view, int64_t slot) {
  const int64_t block = slot / view.rows_per_block;
  return row_in_page(block_pointer(view, block), view.rows_per_block,
                     slot - block * view.rows_per_block, row_layout(view.format, view.row_elems));
}

// ---- one row
// -------------------------------------------------------------------------------------------------

/// Writes one row. Rounding as each format defines it; all but the f32 formats round the values to
/// bf16 first. A tile (fp8_ds_mla, index_mxfp4) or row (index_fp8) with a NaN or infinity gets a
/// NaN scale, so that the fault stays visible.
///
/// @param slot    row to write, 0 <= slot < num_blocks * rows_per_block; every other byte of the
///                page is left untouched.
/// @param values  [row_elems] f32.
/// @param scale   of the cache; used by `fp8` only: stored = e4m3(bf16(value) * (1 / scale)).
/// The view is trusted: the pool that made it has checked format and sizes.
void encode_row(const CacheView& view, int64_t slot, const float* values, float scale = 1.0f);

/// Reads one row: the inverse map on codes. Values of fp8_ds_mla are rounded to bf16 as its readers
/// do (exact unless a foreign scale byte reaches the end of bf16's range).
/// @param values  [row_elems] f32, written.
void decode_row(const CacheView& view, int64_t slot, float* values, float scale = 1.0f);

// ---- pages of gfx942
// -----------------------------------------------------------------------------------------

/// Converts an fp8_ds_mla page of `rows` rows in place from FNUZ E4M3 to OCP E4M3: every scale byte
/// - 1, codes as they are (FNUZ decodes each code to half the OCP value), NaN 0x80 -> 0x7f.
/// @throws Error kDataCorrupt, nothing written: code 0x7f or 0xff (240; no OCP code), scale byte 0.
void fnuz_page_to_ocp(std::byte* page, int64_t rows);
/// The other way: every scale byte + 1, code 0x80 (-0; FNUZ has none) -> 0x00, NaN -> 0x80.
/// @throws Error kDataCorrupt, nothing written: scale byte 254 (its successor means NaN).
void ocp_page_to_fnuz(std::byte* page, int64_t rows);

}  // namespace dsv4
