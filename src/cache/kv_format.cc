#include "cache/kv_format.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"

namespace dsv4 {
namespace {

struct NamedFormat {
  KvFormat format;
  const char* name;
};
constexpr NamedFormat kFormats[] = {
    {KvFormat::kFp8DsMla, "fp8_ds_mla"},
    {KvFormat::kBf16, "bf16"},
    {KvFormat::kFp8, "fp8"},
    {KvFormat::kF32, "f32"},
    {KvFormat::kIndexFp8, "index_fp8"},
    {KvFormat::kIndexMxfp4, "index_mxfp4"},
    {KvFormat::kIndexF32, "index_f32"},
    {KvFormat::kStateF32, "state_f32"},
};

// f32_to_e4m3 as straight-line integer code and one addition, so that loops over it become vector
// code. The codes of a binade count steps of 1/8 of it; below 2^-6 the steps stay those of that
// binade. Adding 2^20 times the binade makes the step the last bit of the sum, so the addition
// rounds to nearest even.
inline uint8_t encode_e4m3(float value) {
  constexpr int32_t kMinExponent = 127 - 6, kMaxBits = 0x43e00000;  // 2^-6, 448
  const int32_t bits = std::bit_cast<int32_t>(value);
  const int32_t magnitude = bits & 0x7fffffff;
  const int32_t clamped = magnitude < kMaxBits ? magnitude : kMaxBits;
  const int32_t exponent = (clamped >> 23) > kMinExponent ? clamped >> 23 : kMinExponent;
  const int32_t binade = (exponent + 20) << 23;
  const float sum = std::bit_cast<float>(clamped) + std::bit_cast<float>(binade);
  const int32_t steps = std::bit_cast<int32_t>(sum) - binade;  // 8..16, or 0..8 below 2^-6
  const int32_t code = ((exponent - kMinExponent) << 3) + steps;
  const int32_t nan_mask = (0x7f800000 - magnitude) >> 31;
  return static_cast<uint8_t>(((code & ~nan_mask) | (0x7f & nan_mask)) | ((bits >> 24) & 0x80));
}

const std::array<float, 256>& e4m3_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> table;
    for (int code = 0; code < 256; ++code)
      table[static_cast<size_t>(code)] = e4m3_to_f32(static_cast<uint8_t>(code));
    return table;
  }();
  return values;
}

// Largest magnitude as float; above infinity in bit order (a NaN) when any value is NaN. Integer
// maxima of magnitude bits order floats, and no NaN is lost.
float amax_of(const float* values, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu;
    largest = std::max(largest, bits);
  }
  return std::bit_cast<float>(largest);
}

bool is_finite(float value) {
  return (std::bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u;
}

// f32_to_bf16, left in the upper half; a select in place of its branch, for vector code.
inline uint32_t bf16_upper_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t quiet = bits | 0x400000u;
  return ((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded) & 0xffff0000u;
}

void round_row(const float* values, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = std::bit_cast<float>(bf16_upper_bits(values[i]));
}

void store_bf16(const float* values, int count, std::byte* out) {
  for (int i = 0; i < count; ++i) {
    const auto bits = static_cast<uint16_t>(bf16_upper_bits(values[i]) >> 16);
    std::memcpy(out + 2 * i, &bits, 2);
  }
}

void load_bf16(const std::byte* in, int count, float* values) {
  for (int i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + 2 * i, 2);
    values[i] = bf16_to_f32(bits);
  }
}

void store_e4m3(const float* values, int count, float factor, std::byte* out) {
  auto* codes = reinterpret_cast<uint8_t*>(out);
  for (int i = 0; i < count; ++i) {
    codes[i] = encode_e4m3(values[i] * factor);
  }
}

// As store_e4m3, of values rounded to bf16, which pass through a buffer so that rows of any length
// need no allocation.
void store_rounded_e4m3(const float* values, int count, float factor, std::byte* out) {
  constexpr int kChunk = 64;
  float rounded[kChunk];
  for (int begin = 0; begin < count; begin += kChunk) {
    const int chunk = std::min(kChunk, count - begin);
    round_row(values + begin, chunk, rounded);
    store_e4m3(rounded, chunk, factor, out + begin);
  }
}

void load_e4m3(const std::byte* in, int count, float factor, float* values) {
  const std::array<float, 256>& table = e4m3_values();
  const auto* codes = reinterpret_cast<const uint8_t*>(in);
  for (int i = 0; i < count; ++i) values[i] = table[codes[i]] * factor;
}

// ---- fp8_ds_mla

void encode_fp8_ds_mla(const float* values, RowAddress row) {
  auto* scales = reinterpret_cast<uint8_t*>(row.scales);
  for (int tile = 0; tile < Fp8DsMla::kTiles; ++tile) {
    float rounded[Fp8DsMla::kTileElems];
    std::byte* codes = row.values + tile * Fp8DsMla::kTileElems;
    round_row(values + tile * Fp8DsMla::kTileElems, Fp8DsMla::kTileElems, rounded);
    const float amax = amax_of(rounded, Fp8DsMla::kTileElems);
    if (!is_finite(amax)) {
      scales[tile] = 0xff;
      std::memset(codes, 0x7f, Fp8DsMla::kTileElems);
      continue;
    }
    // -22 <= exponent <= 120 for finite bf16, so the byte needs no clamp.
    const int exponent = ceil_log2_ratio(std::max(kFp8AmaxFloor, amax), kE4m3Max);
    scales[tile] = static_cast<uint8_t>(exponent + 127);
    store_e4m3(rounded, Fp8DsMla::kTileElems, exp2_int(-exponent), codes);
  }
  scales[Fp8DsMla::kTiles] = 0;
  store_bf16(values + Fp8DsMla::kNopeDim, Fp8DsMla::kRopeDim,
             row.values + Fp8DsMla::kRopeOffsetBytes);
}

void decode_fp8_ds_mla(RowAddress row, float* values) {
  const auto* scales = reinterpret_cast<const uint8_t*>(row.scales);
  for (int tile = 0; tile < Fp8DsMla::kTiles; ++tile) {
    float* out = values + tile * Fp8DsMla::kTileElems;
    load_e4m3(row.values + tile * Fp8DsMla::kTileElems, Fp8DsMla::kTileElems,
              e8m0_to_f32(scales[tile]), out);
    round_row(out, Fp8DsMla::kTileElems, out);
  }
  load_bf16(row.values + Fp8DsMla::kRopeOffsetBytes, Fp8DsMla::kRopeDim,
            values + Fp8DsMla::kNopeDim);
}

// ---- indexer rows

void encode_index_fp8(const float* values, int count, RowAddress row) {
  // Rounding to bf16 is monotonic: the largest rounded magnitude is the largest one, rounded.
  const float amax = round_bf16(amax_of(values, count));
  float scale = std::bit_cast<float>(0x7fc00000u);
  if (is_finite(amax)) {
    const int exponent = ceil_log2_ratio(std::max(kFp8AmaxFloor, amax), kE4m3Max);
    scale = exp2_int(exponent);
    store_rounded_e4m3(values, count, exp2_int(-exponent), row.values);
  } else {
    std::memset(row.values, 0x7f, static_cast<size_t>(count));
  }
  std::memcpy(row.scales, &scale, sizeof(scale));
}

void decode_index_fp8(RowAddress row, int count, float* values) {
  float scale;
  std::memcpy(&scale, row.scales, sizeof(scale));
  load_e4m3(row.values, count, scale, values);
}

void encode_index_mxfp4(const float* values, int count, RowAddress row) {
  auto* codes = reinterpret_cast<uint8_t*>(row.values);
  auto* scales = reinterpret_cast<uint8_t*>(row.scales);
  for (int begin = 0; begin < count; begin += kMxfp4BlockElems) {
    float rounded[kMxfp4BlockElems];
    round_row(values + begin, kMxfp4BlockElems, rounded);
    const float amax = amax_of(rounded, kMxfp4BlockElems);
    uint8_t* out = codes + begin / 2;
    if (!is_finite(amax)) {
      scales[begin / kMxfp4BlockElems] = 0xff;
      std::memset(out, 0x77, kMxfp4BlockElems / 2);
      continue;
    }
    // -126 <= exponent <= 126 for finite bf16: both scale and reciprocal are normal floats.
    const int exponent = ceil_log2_ratio(std::max(kMxfp4AmaxFloor, amax), kE2m1Max);
    scales[begin / kMxfp4BlockElems] = static_cast<uint8_t>(exponent + 127);
    const float factor = exp2_int(-exponent);
    for (int i = 0; i < kMxfp4BlockElems / 2; ++i) {
      const uint8_t low = f32_to_e2m1(rounded[2 * i] * factor);
      const uint8_t high = f32_to_e2m1(rounded[2 * i + 1] * factor);
      out[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

void decode_index_mxfp4(RowAddress row, int count, float* values) {
  const auto* codes = reinterpret_cast<const uint8_t*>(row.values);
  const auto* scales = reinterpret_cast<const uint8_t*>(row.scales);
  for (int i = 0; i < count; ++i) {
    const int code = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    values[i] = e2m1_to_f32(static_cast<uint8_t>(code)) * e8m0_to_f32(scales[i / kMxfp4BlockElems]);
  }
}

// ---- FNUZ

constexpr int kNanScaleByte = 255;

// Refuses a page that holds a scale byte without a successor / predecessor, or a refused code.
void check_page(const std::byte* page, int64_t rows, int refused_scale, bool refuse_240,
                const char* what) {
  const RowLayout layout = row_layout(KvFormat::kFp8DsMla, Fp8DsMla::kHeadDim);
  for (int64_t row = 0; row < rows; ++row) {
    const auto* codes = reinterpret_cast<const uint8_t*>(page + row * layout.value_bytes);
    const auto* scales = reinterpret_cast<const uint8_t*>(page + rows * layout.value_bytes +
                                                          row * layout.scale_bytes);
    for (int tile = 0; tile < Fp8DsMla::kTiles; ++tile) {
      if (scales[tile] == refused_scale) {
        fail(ErrorCode::kDataCorrupt, what, ": row ", row, " of ", rows, ", scale byte ", tile,
             " is ", refused_scale, ", which has no counterpart");
      }
    }
    if (!refuse_240) continue;
    for (int i = 0; i < Fp8DsMla::kNopeDim; ++i) {
      if ((codes[i] & 0x7f) == 0x7f) {
        fail(ErrorCode::kDataCorrupt, what, ": row ", row, " of ", rows, ", dim ", i, " has code ",
             static_cast<int>(codes[i]), " (magnitude 240), expected at most 224");
      }
    }
  }
}

template <typename MapCode>
void convert_page(std::byte* page, int64_t rows, int scale_step, MapCode&& map_code) {
  const RowLayout layout = row_layout(KvFormat::kFp8DsMla, Fp8DsMla::kHeadDim);
  for (int64_t row = 0; row < rows; ++row) {
    const RowAddress address = row_in_page(page, rows, row, layout);
    auto* codes = reinterpret_cast<uint8_t*>(address.values);
    auto* scales = reinterpret_cast<uint8_t*>(address.scales);
    for (int i = 0; i < Fp8DsMla::kNopeDim; ++i) codes[i] = map_code(codes[i]);
    for (int tile = 0; tile < Fp8DsMla::kTiles; ++tile) {
      if (scales[tile] != kNanScaleByte) {
        scales[tile] = static_cast<uint8_t>(scales[tile] + scale_step);
      }
    }
  }
}

}  // namespace

const char* kv_format_name(KvFormat format) {
  for (const NamedFormat& entry : kFormats) {
    if (entry.format == format) return entry.name;
  }
  return "unknown";
}

std::optional<KvFormat> parse_kv_format(std::string_view name) {
  for (KvFormat format : {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32}) {
    if (name == kv_format_name(format)) return format;
  }
  return std::nullopt;
}

const char* cache_role_name(CacheRole role) {
  switch (role) {
    case CacheRole::kWindow:
      return "window";
    case CacheRole::kCompressed:
      return "compressed";
    case CacheRole::kIndex:
      return "index";
    case CacheRole::kState:
      return "state";
    case CacheRole::kIndexState:
      return "index_state";
  }
  return "unknown";
}

void check_row_elems(KvFormat format, int row_elems) {
  if (format == KvFormat::kFp8DsMla && row_elems != Fp8DsMla::kHeadDim) {
    fail(ErrorCode::kInvalidArgument, "cache format fp8_ds_mla: row of ", row_elems,
         " elements, expected ", Fp8DsMla::kHeadDim, " (", Fp8DsMla::kNopeDim, " E4M3 + ",
         Fp8DsMla::kRopeDim, " bf16); use bf16, fp8 or f32 for other head sizes");
  }
  if (row_elems < 1) {
    fail(ErrorCode::kInvalidArgument, "cache format ", kv_format_name(format), ": row of ",
         row_elems, " elements, expected at least 1");
  }
  if (format == KvFormat::kIndexMxfp4 && row_elems % kMxfp4BlockElems != 0) {
    fail(ErrorCode::kInvalidArgument, "cache format index_mxfp4: row of ", row_elems,
         " elements, expected a multiple of ", kMxfp4BlockElems);
  }
}

int64_t page_bytes(KvFormat format, int64_t rows, int row_elems) {
  check_row_elems(format, row_elems);
  const std::optional<int64_t> bytes = checked_mul(rows, row_layout(format, row_elems).row_bytes());
  if (rows < 1 || !bytes) {
    fail(ErrorCode::kInvalidArgument, "cache page of ", rows, " rows of format ",
         kv_format_name(format), ", expected at least 1 and a size below 2^63 bytes");
  }
  return *bytes;
}

int64_t upstream_page_bytes(KvFormat format, int64_t rows, int row_elems, int64_t alignment) {
  if (alignment < 1) {
    fail(ErrorCode::kInvalidArgument, "page alignment ", alignment, ", expected at least 1");
  }
  return round_up(page_bytes(format, rows, row_elems), alignment);
}

void encode_row(const CacheView& view, int64_t slot, const float* values, float scale) {
  const RowAddress row = row_address(view, slot);
  switch (view.format) {
    case KvFormat::kFp8DsMla:
      return encode_fp8_ds_mla(values, row);
    case KvFormat::kBf16:
      return store_bf16(values, view.row_elems, row.values);
    case KvFormat::kFp8:
      return store_rounded_e4m3(values, view.row_elems, 1.0f / scale, row.values);
    case KvFormat::kIndexFp8:
      return encode_index_fp8(values, view.row_elems, row);
    case KvFormat::kIndexMxfp4:
      return encode_index_mxfp4(values, view.row_elems, row);
    case KvFormat::kF32:
    case KvFormat::kIndexF32:
    case KvFormat::kStateF32:
      std::memcpy(row.values, values, sizeof(float) * static_cast<size_t>(view.row_elems));
      return;
  }
}

void decode_row(const CacheView& view, int64_t slot, float* values, float scale) {
  const RowAddress row = row_address(view, slot);
  switch (view.format) {
    case KvFormat::kFp8DsMla:
      return decode_fp8_ds_mla(row, values);
    case KvFormat::kBf16:
      return load_bf16(row.values, view.row_elems, values);
    case KvFormat::kFp8:
      return load_e4m3(row.values, view.row_elems, scale, values);
    case KvFormat::kIndexFp8:
      return decode_index_fp8(row, view.row_elems, values);
    case KvFormat::kIndexMxfp4:
      return decode_index_mxfp4(row, view.row_elems, values);
    case KvFormat::kF32:
    case KvFormat::kIndexF32:
    case KvFormat::kStateF32:
      std::memcpy(values, row.values, sizeof(float) * static_cast<size_t>(view.row_elems));
      return;
  }
}

void fnuz_page_to_ocp(std::byte* page, int64_t rows) {
  check_page(page, rows, 0, true, "FNUZ page");
  convert_page(page, rows, -1, [](uint8_t code) -> uint8_t { return code == 0x80 ? 0x7f : code; });
}

void ocp_page_to_fnuz(std::byte* page, int64_t rows) {
  check_page(page, rows, 254, false, "OCP page");
  convert_page(page, rows, +1, [](uint8_t code) -> uint8_t {
    if (code == 0x80) return 0x00;
    return (code & 0x7f) == 0x7f ? 0x80 : code;
  });
}

}  // namespace dsv4
