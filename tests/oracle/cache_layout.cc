#include "tests/oracle/cache_layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tests/oracle/numbers.h"

namespace oracle {
namespace {

constexpr int kRopeDim = 64;  // fp8_ds_mla: the last 64 of 512 stay bf16
constexpr int kTile = 64;     // ... and the others share a scale in tiles of 64
constexpr int kMxfp4Block = 32;

struct RowSizes {
  int64_t values, scales;
};

RowSizes row_sizes(RowLayout layout, int elems) {
  switch (layout) {
    case RowLayout::kFp8DsMla:
      return {576, 8};
    case RowLayout::kBf16:
      return {2 * elems, 0};
    case RowLayout::kFp8:
      return {elems, 0};
    case RowLayout::kIndexFp8:
      return {elems, 4};
    case RowLayout::kIndexMxfp4:
      return {elems / 2, elems / kMxfp4Block};
    case RowLayout::kF32:
    case RowLayout::kIndexF32:
      break;
  }
  return {4 * elems, 0};
}

struct RowPointers {
  uint8_t *values, *scales;
};

RowPointers locate(const Page& page, int64_t row) {
  const RowSizes sizes = row_sizes(page.layout, page.elems);
  return {page.base + row * sizes.values,
          page.base + page.rows * sizes.values + row * sizes.scales};
}

void store_float(uint8_t* to, double value) {
  const auto narrow = static_cast<float>(value);
  std::memcpy(to, &narrow, sizeof(narrow));
}
double load_float(const uint8_t* from) {
  float value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
// bf16 is the upper half of a binary32.
void store_bf16(uint8_t* to, double value) {
  const auto exact = static_cast<float>(round_bf16(value));
  std::memcpy(to, reinterpret_cast<const char*>(&exact) + 2, 2);
}
double load_bf16(const uint8_t* from) {
  float value = 0;
  std::memcpy(reinterpret_cast<char*>(&value) + 2, from, 2);
  return value;
}

Vector rounded_to_bf16(std::span<const double> values) {
  Vector out(values.begin(), values.end());
  for (double& value : out) value = round_bf16(value);
  return out;
}

}  // namespace

int64_t page_bytes(RowLayout layout, int64_t rows, int elems) {
  const RowSizes sizes = row_sizes(layout, elems);
  return rows * (sizes.values + sizes.scales);
}

std::vector<uint8_t> row_bytes(const Page& page, int64_t row) {
  const RowSizes sizes = row_sizes(page.layout, page.elems);
  const auto [values, scales] = locate(page, row);
  std::vector<uint8_t> out(values, values + sizes.values);
  out.insert(out.end(), scales, scales + sizes.scales);
  return out;
}

void put_row_bytes(const Page& page, int64_t row, std::span<const uint8_t> bytes) {
  const RowSizes sizes = row_sizes(page.layout, page.elems);
  const auto [values, scales] = locate(page, row);
  std::ranges::copy(bytes.first(static_cast<size_t>(sizes.values)), values);
  std::ranges::copy(bytes.subspan(static_cast<size_t>(sizes.values)), scales);
}

void write_row(const Page& page, int64_t row, std::span<const double> values) {
  const auto [to, scales] = locate(page, row);
  switch (page.layout) {
    case RowLayout::kFp8DsMla: {
      const KvRow packed = quantise_kv_row(values, kRopeDim);
      std::ranges::copy(packed.codes, to);
      for (int i = 0; i < kRopeDim; ++i) {
        store_bf16(to + packed.codes.size() + 2 * i, packed.rotated[i]);
      }
      std::ranges::copy(packed.scales, scales);
      scales[packed.scales.size()] = 0;
      return;
    }
    case RowLayout::kBf16:
      for (int i = 0; i < page.elems; ++i) store_bf16(to + 2 * i, values[i]);
      return;
    case RowLayout::kFp8:
      for (int i = 0; i < page.elems; ++i) to[i] = e4m3_encode(round_bf16(values[i]));
      return;
    case RowLayout::kIndexFp8: {
      const QuantisedBlock block = quantise_e4m3(rounded_to_bf16(values), kIndexFloor);
      std::ranges::copy(block.codes, to);
      store_float(scales, std::ldexp(1.0, block.exponent));
      return;
    }
    case RowLayout::kIndexMxfp4: {
      const Vector rounded = rounded_to_bf16(values);
      for (int begin = 0; begin < page.elems; begin += kMxfp4Block) {
        const QuantisedBlock block = quantise_e2m1({rounded.data() + begin, kMxfp4Block});
        for (int i = 0; i < kMxfp4Block; i += 2) {
          to[(begin + i) / 2] = static_cast<uint8_t>(block.codes[i] | block.codes[i + 1] << 4);
        }
        scales[begin / kMxfp4Block] = static_cast<uint8_t>(block.exponent + 127);
      }
      return;
    }
    case RowLayout::kF32:
    case RowLayout::kIndexF32:
      for (int i = 0; i < page.elems; ++i) store_float(to + 4 * i, values[i]);
  }
}

Vector read_row(const Page& page, int64_t row) {
  const auto [from, scales] = locate(page, row);
  Vector out;
  for (int i = 0; i < page.elems; ++i) {
    switch (page.layout) {
      case RowLayout::kFp8DsMla: {
        const int nope = page.elems - kRopeDim;
        out.push_back(i < nope ? e4m3_decode(from[i]) * e8m0_decode(scales[i / kTile])
                               : load_bf16(from + nope + 2 * (i - nope)));
        break;
      }
      case RowLayout::kBf16:
        out.push_back(load_bf16(from + 2 * i));
        break;
      case RowLayout::kFp8:
        out.push_back(e4m3_decode(from[i]));
        break;
      case RowLayout::kIndexFp8:
        out.push_back(e4m3_decode(from[i]) * load_float(scales));
        break;
      case RowLayout::kIndexMxfp4: {
        const int code = i % 2 == 0 ? from[i / 2] & 15 : from[i / 2] >> 4;
        out.push_back(e2m1_decode(static_cast<uint8_t>(code)) *
                      e8m0_decode(scales[i / kMxfp4Block]));
        break;
      }
      case RowLayout::kF32:
      case RowLayout::kIndexF32:
        out.push_back(load_float(from + 4 * i));
    }
  }
  return out;
}

}  // namespace oracle
