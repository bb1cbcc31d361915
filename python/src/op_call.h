// One call of a device operation from Python: borrows the tensors, checks them, finds device,
// stream and scratch, and launches without the GIL.
#pragma once
#include "casters.h"

#include <deque>
#include <initializer_list>
#include <optional>
#include <string>

#include "borrowed.h"
#include "core/fail.h"
#include "devices.h"
#include "ops/ops.h"

namespace dsv4::python {

/// A stream as Python gives it: the number of a cudaStream_t or hipStream_t; None: the default one.
using StreamArgument = std::optional<intptr_t>;

/// Extent that may be anything.
constexpr int64_t kAny = -1;

class OpCall {
 public:
  explicit OpCall(StreamArgument stream) : stream_(reinterpret_cast<void*>(stream.value_or(0))) {}

  /// A tensor that is read. Its dtype becomes the first of `dtypes` whose bytes it has; innermost
  /// elements are adjacent; extents are as given, or kAny.
  /// @throws Error kInvalidArgument naming the argument, what was expected and what was given.
  ConstTensor input(nb::handle object, const char* what, std::initializer_list<DType> dtypes,
                    std::initializer_list<int64_t> shape);
  /// A tensor that is written; refused when its owner lends it for reading only.
  Tensor output(nb::handle object, const char* what, std::initializer_list<DType> dtypes,
                std::initializer_list<int64_t> shape);
  /// A contiguous array of `count` (or kAny) elements; null for None where `optional`.
  const int32_t* int32_array(nb::handle object, const char* what, int64_t count);
  const int64_t* int64_array(nb::handle object, const char* what, int64_t count);
  const float* float_array(nb::handle object, const char* what, int64_t count);
  float* float_output(nb::handle object, const char* what, int64_t count);
  /// Pages of a cache: [num_blocks, ...], the bytes of a block adjacent, any stride between blocks.
  CacheView cache(nb::handle pages, const char* what, KvFormat format, int rows_per_block,
                  int row_elems, bool written);
  /// [num_seqs, columns] i32 of a cache with `rows_per_block` rows a block.
  BlockTable block_table(nb::handle object, const char* what, int rows_per_block);

  /// Of the tensors borrowed so far, at least one.
  const DeviceId& device_id() const { return borrowed_.front().device(); }
  /// The stream argument as it is.
  Stream device_stream() const { return {stream_}; }
  OpenDevice& device();
  /// Scratch comes from `allocate(bytes)`, which returns an array of bytes; None: the device's own,
  /// one for each stream. Under a graph capture nothing may be allocated but by the graph's owner.
  void set_scratch(nb::handle allocate) { allocate_scratch_ = nb::borrow(allocate); }

  /// Of the device of the tensors borrowed so far.
  const Ops& ops() { return device().device().ops(); }

  /// Runs `op` with scratch for `limits` (threads are filled in).
  template <typename Params>
  void run(Op<Params> Ops::*op, const char* name, const Params& params, ScratchLimits limits) {
    OpenDevice& opened = device();
    Device& target = opened.device();
    const Ops& ops = target.ops();
    if (ops.*op == nullptr) {
      fail(ErrorCode::kUnsupported, target.id().str(), " has no operation ", name,
           " in this build");
    }
    limits.num_threads = target.num_threads();
    // Never none: an arena without memory measures.
    const int64_t bytes = ops.scratch_bytes(limits) + Arena::kAlignment;
    std::byte* scratch = caller_scratch(bytes);
    const nb::gil_scoped_release no_gil;
    const std::lock_guard lock(opened.mutex());
    const Stream stream = opened.stream(stream_);
    if (scratch == nullptr) scratch = opened.scratch(stream, bytes);
    Arena arena(scratch, bytes);
    (ops.*op)(params, {stream, &arena, &ops});
  }

 private:
  const Borrowed& borrow(nb::handle object, const char* what);
  Tensor checked(const Borrowed& given, const char* what, std::initializer_list<DType> dtypes,
                 std::initializer_list<int64_t> shape) const;
  void refuse_read_only(const Borrowed& given, const char* what) const;
  // Null without set_scratch(), else at least `bytes` that are kept until the call ends.
  std::byte* caller_scratch(int64_t bytes);

  void* stream_;
  nb::object allocate_scratch_ = nb::none();
  std::deque<Borrowed> borrowed_;
};

}  // namespace dsv4::python
