// What a test of an operation needs around the call: numbers up to the device and back, scratch
// memory, guard bytes. Works for every device.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "core/arena.h"
#include "dsv4/device.h"
#include "ops/ops.h"
#include "tests/oracle/cache_layout.h"

namespace dsv4::testing {

using Vector = std::vector<double>;

/// A device and the table of operations to test on it (not always device.ops(): a candidate may be
/// forced).
struct Subject {
  Device* device;
  const Ops* ops;
};

/// Numbers rounded to `dtype` (kF32 or kBf16): exact inputs for the oracle.
Vector rounded(DType dtype, Vector values);

/// Owns device memory of one test. Every piece lies between guard bytes.
class DeviceMemory {
 public:
  explicit DeviceMemory(Device& device) : device_(device) {}

  /// `bytes` of memory, all 0xff: NaN in every float format.
  std::byte* raw(int64_t bytes);
  template <typename T>
  T* put(const std::vector<T>& values) {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    std::byte* data = raw(bytes);
    upload(data, values.data(), bytes);
    return reinterpret_cast<T*>(data);
  }
  /// A contiguous tensor of rounded `values` (kF32, kBf16), or of NaN where there are none.
  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape, const Vector& values = {});

  void upload(void* to, const void* from, int64_t bytes);
  template <typename T>
  std::vector<T> get(const T* from, int64_t count) const {
    std::vector<T> out(static_cast<size_t>(count));
    download(out.data(), from, count * static_cast<int64_t>(sizeof(T)));
    return out;
  }
  /// All elements of a float tensor in row-major order, whatever its strides.
  Vector numbers(const ConstTensor& tensor) const;

  /// Fails when a byte around any piece was written.
  ::testing::AssertionResult guards_intact() const;

 private:
  void download(void* to, const void* from, int64_t bytes) const;
  struct Piece {
    Buffer buffer;
    int64_t bytes;
  };
  Device& device_;
  std::deque<Piece> pieces_;
};

/// Runs an operation with exactly `scratch_bytes` of scratch, all NaN before: an operation that
/// reads scratch before it writes it is found.
template <typename Params>
void run_op_with(const Subject& subject, Op<Params> op, const Params& params,
                 int64_t scratch_bytes) {
  const Stream stream = subject.device->default_stream();
  Buffer scratch = subject.device->allocate(std::max<int64_t>(scratch_bytes, 1));
  const std::vector<std::byte> fill(static_cast<size_t>(scratch_bytes), std::byte{0xff});
  subject.device->copy_to_device(scratch.data(), fill.data(), scratch_bytes, stream);
  Arena arena(scratch.data(), scratch_bytes);
  op(params, {stream, &arena, subject.ops});
  subject.device->synchronize(stream);
}

/// As above; a first run with a measuring arena tells what scratch the operation takes.
template <typename Params>
void run_op(const Subject& subject, Op<Params> op, const Params& params) {
  Arena measure;
  op(params, {subject.device->default_stream(), &measure, subject.ops});
  run_op_with(subject, op, params, measure.peak());
}

/// The oracle's name of a format.
oracle::RowLayout oracle_layout(KvFormat format);

/// A paged cache in device memory with a host image; rows not written are NaN.
class PagedCache {
 public:
  /// Pages are rounded up to 64 bytes, as in a pool, and `padding_bytes` further apart.
  PagedCache(DeviceMemory& memory, KvFormat format, int elems, int rows_per_block, int num_blocks,
             int64_t padding_bytes = 64);
  const CacheView& view() const { return view_; }
  /// Into the host image; `upload()` makes it visible.
  void write(int64_t slot, std::span<const double> values);
  void put_bytes(int64_t slot, std::span<const uint8_t> bytes);
  void upload();
  void download();
  /// From the host image: what a reader of the row gets.
  Vector read(int64_t slot) const;
  std::vector<uint8_t> bytes(int64_t slot) const;
  /// Fails when a byte of the host image outside the rows `slots` is not 0xff.
  ::testing::AssertionResult only_wrote(const std::vector<int64_t>& slots) const;

 private:
  oracle::Page page(int64_t slot) const;
  DeviceMemory& memory_;
  CacheView view_;
  mutable std::vector<uint8_t> image_;
};

}  // namespace dsv4::testing
