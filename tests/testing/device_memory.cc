#include "tests/testing/device_memory.h"

#include <algorithm>

#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "tests/oracle/numbers.h"

namespace dsv4::testing {
namespace {

constexpr int64_t kGuardBytes = 4096;
constexpr std::byte kGuard{0xa5};

}  // namespace

Vector rounded(DType dtype, Vector values) {
  for (double& value : values) {
    value = dtype == DType::kBf16 ? oracle::round_bf16(value) : oracle::round_f32(value);
  }
  return values;
}

std::byte* DeviceMemory::raw(int64_t bytes) {
  pieces_.push_back({device_.allocate(bytes + 2 * kGuardBytes), bytes});
  std::vector<std::byte> fill(static_cast<size_t>(bytes + 2 * kGuardBytes), kGuard);
  std::fill_n(fill.begin() + kGuardBytes, bytes, std::byte{0xff});
  std::byte* base = pieces_.back().buffer.data();
  upload(base, fill.data(), static_cast<int64_t>(fill.size()));
  return base + kGuardBytes;
}

Tensor DeviceMemory::tensor(DType dtype, std::initializer_list<int64_t> shape,
                            const Vector& values) {
  Tensor out(nullptr, dtype, shape);
  out.data = raw(out.num_bytes());
  if (values.empty()) return out;
  DSV4_CHECK(static_cast<int64_t>(values.size()) == out.num_elements());
  if (dtype == DType::kBf16) {
    std::vector<uint16_t> bits;
    for (double value : values) bits.push_back(f32_to_bf16(static_cast<float>(value)));
    upload(out.data, bits.data(), out.num_bytes());
  } else {
    DSV4_CHECK(dtype == DType::kF32);
    const std::vector<float> floats(values.begin(), values.end());
    upload(out.data, floats.data(), out.num_bytes());
  }
  return out;
}

void DeviceMemory::upload(void* to, const void* from, int64_t bytes) {
  if (bytes == 0) return;
  device_.copy_to_device(to, from, bytes, device_.default_stream());
  device_.synchronize(device_.default_stream());
}

void DeviceMemory::download(void* to, const void* from, int64_t bytes) const {
  if (bytes == 0) return;
  device_.copy_to_host(to, from, bytes, device_.default_stream());
  device_.synchronize(device_.default_stream());
}

Vector DeviceMemory::numbers(const ConstTensor& tensor) const {
  int64_t extent = 1;  // elements from the first to one past the last
  for (int i = 0; i < tensor.rank; ++i) extent += (tensor.shape[i] - 1) * tensor.strides[i];
  Vector flat;
  if (tensor.dtype == DType::kBf16) {
    for (uint16_t bits : get(tensor.as<uint16_t>(), extent)) flat.push_back(bf16_to_f32(bits));
  } else {
    DSV4_CHECK(tensor.dtype == DType::kF32);
    for (float value : get(tensor.as<float>(), extent)) flat.push_back(value);
  }
  Vector out;
  for (int64_t i = 0; i < tensor.num_elements(); ++i) {
    int64_t rest = i, offset = 0;
    for (int d = tensor.rank - 1; d >= 0; --d) {
      offset += rest % tensor.shape[d] * tensor.strides[d];
      rest /= tensor.shape[d];
    }
    out.push_back(flat[static_cast<size_t>(offset)]);
  }
  return out;
}

::testing::AssertionResult DeviceMemory::guards_intact() const {
  for (const Piece& piece : pieces_) {
    const std::vector<std::byte> all = get(piece.buffer.data(), piece.bytes + 2 * kGuardBytes);
    for (int64_t i = 0; i < piece.bytes + 2 * kGuardBytes; ++i) {
      const bool inside = i >= kGuardBytes && i < kGuardBytes + piece.bytes;
      if (!inside && all[static_cast<size_t>(i)] != kGuard) {
        return ::testing::AssertionFailure() << "byte " << i - kGuardBytes << " of a piece of "
                                             << piece.bytes << " bytes was overwritten";
      }
    }
  }
  return ::testing::AssertionSuccess();
}

oracle::RowLayout oracle_layout(KvFormat format) {
  switch (format) {
    case KvFormat::kFp8DsMla:
      return oracle::RowLayout::kFp8DsMla;
    case KvFormat::kBf16:
      return oracle::RowLayout::kBf16;
    case KvFormat::kFp8:
      return oracle::RowLayout::kFp8;
    case KvFormat::kIndexFp8:
      return oracle::RowLayout::kIndexFp8;
    case KvFormat::kIndexMxfp4:
      return oracle::RowLayout::kIndexMxfp4;
    case KvFormat::kIndexF32:
      return oracle::RowLayout::kIndexF32;
    case KvFormat::kF32:
    case KvFormat::kStateF32:
      break;
  }
  return oracle::RowLayout::kF32;
}

PagedCache::PagedCache(DeviceMemory& memory, KvFormat format, int elems, int rows_per_block,
                       int num_blocks, int64_t padding_bytes)
    : memory_(memory) {
  view_.block_stride_bytes =
      round_up(oracle::page_bytes(oracle_layout(format), rows_per_block, elems), 64) +
      padding_bytes;
  view_.num_blocks = num_blocks;
  view_.rows_per_block = rows_per_block;
  view_.format = format;
  view_.row_elems = elems;
  const int64_t bytes = view_.block_stride_bytes * num_blocks;
  view_.base = memory.raw(bytes);
  image_.assign(static_cast<size_t>(bytes), 0xff);
}

oracle::Page PagedCache::page(int64_t slot) const {
  return {image_.data() + slot / view_.rows_per_block * view_.block_stride_bytes,
          view_.rows_per_block, oracle_layout(view_.format), view_.row_elems};
}

void PagedCache::write(int64_t slot, std::span<const double> values) {
  oracle::write_row(page(slot), slot % view_.rows_per_block, values);
}

void PagedCache::put_bytes(int64_t slot, std::span<const uint8_t> bytes) {
  oracle::put_row_bytes(page(slot), slot % view_.rows_per_block, bytes);
}

void PagedCache::upload() {
  memory_.upload(view_.base, image_.data(), static_cast<int64_t>(image_.size()));
}

void PagedCache::download() {
  image_ = memory_.get(reinterpret_cast<const uint8_t*>(view_.base),
                       static_cast<int64_t>(image_.size()));
}

Vector PagedCache::read(int64_t slot) const {
  return oracle::read_row(page(slot), slot % view_.rows_per_block);
}

std::vector<uint8_t> PagedCache::bytes(int64_t slot) const {
  return oracle::row_bytes(page(slot), slot % view_.rows_per_block);
}

::testing::AssertionResult PagedCache::only_wrote(const std::vector<int64_t>& slots) const {
  // With 0xff put back into the allowed rows nothing else may be left.
  std::vector<uint8_t> rest = image_;
  for (int64_t slot : slots) {
    oracle::Page at = page(slot);
    at.base = rest.data() + (at.base - image_.data());
    const std::vector<uint8_t> blank(
        static_cast<size_t>(oracle::page_bytes(at.layout, 1, at.elems)), 0xff);
    oracle::put_row_bytes(at, slot % view_.rows_per_block, blank);
  }
  for (size_t i = 0; i < rest.size(); ++i) {
    if (rest[i] != 0xff) {
      return ::testing::AssertionFailure()
             << "byte " << i % view_.block_stride_bytes << " of block "
             << i / view_.block_stride_bytes << " was written, outside the rows to write";
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace dsv4::testing
