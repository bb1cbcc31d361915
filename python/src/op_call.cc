#include "op_call.h"

#include "cache/kv_format.h"
#include "core/checked_math.h"

namespace dsv4::python {
namespace {

std::string expected_text(std::initializer_list<DType> dtypes,
                          std::initializer_list<int64_t> shape) {
  std::string out = "[";
  for (int64_t extent : shape) {
    if (out.size() > 1) out += ", ";
    out += extent == kAny ? "*" : std::to_string(extent);
  }
  out += "]";
  const char* separator = " ";
  for (DType dtype : dtypes) {
    out += separator;
    out += dtype_name(dtype);
    separator = " or ";
  }
  return out;
}

bool shape_fits(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.rank != static_cast<int>(shape.size())) return false;
  int i = 0;
  for (int64_t extent : shape) {
    if (extent != kAny && extent != tensor.shape[i]) return false;
    ++i;
  }
  return true;
}

bool inner_elements_adjacent(const Tensor& tensor) {
  const int last = tensor.rank - 1;
  return tensor.rank == 0 || tensor.shape[last] <= 1 || tensor.strides[last] == 1;
}

}  // namespace

const Borrowed& OpCall::borrow(nb::handle object, const char* what) {
  const Borrowed& given = borrowed_.emplace_back(object, what, stream_);
  const DeviceId& first = borrowed_.front().device();
  if (!(given.device() == first)) {
    fail(ErrorCode::kInvalidArgument, what, " is on ", given.device().str(),
         ", other arguments are on ", first.str());
  }
  return given;
}

Tensor OpCall::checked(const Borrowed& given, const char* what, std::initializer_list<DType> dtypes,
                       std::initializer_list<int64_t> shape) const {
  Tensor out = given.view();
  for (DType dtype : dtypes) {
    if (!same_bytes(out.dtype, dtype)) continue;
    out.dtype = dtype;
    if (shape_fits(out, shape) && inner_elements_adjacent(out)) return out;
    break;
  }
  fail(ErrorCode::kInvalidArgument, what, " is ", describe(given.view()),
       inner_elements_adjacent(given.view()) ? "" : " with distant innermost elements",
       ", expected ", expected_text(dtypes, shape));
}

void OpCall::refuse_read_only(const Borrowed& given, const char* what) const {
  if (given.read_only()) {
    fail(ErrorCode::kInvalidArgument, what, " is read-only, and the operation writes it");
  }
}

ConstTensor OpCall::input(nb::handle object, const char* what, std::initializer_list<DType> dtypes,
                          std::initializer_list<int64_t> shape) {
  return checked(borrow(object, what), what, dtypes, shape);
}

Tensor OpCall::output(nb::handle object, const char* what, std::initializer_list<DType> dtypes,
                      std::initializer_list<int64_t> shape) {
  const Borrowed& given = borrow(object, what);
  refuse_read_only(given, what);
  return checked(given, what, dtypes, shape);
}

const int32_t* OpCall::int32_array(nb::handle object, const char* what, int64_t count) {
  return input(object, what, {DType::kI32}, {count}).as<int32_t>();
}
const int64_t* OpCall::int64_array(nb::handle object, const char* what, int64_t count) {
  return input(object, what, {DType::kI64}, {count}).as<int64_t>();
}
const float* OpCall::float_array(nb::handle object, const char* what, int64_t count) {
  return input(object, what, {DType::kF32}, {count}).as<float>();
}
float* OpCall::float_output(nb::handle object, const char* what, int64_t count) {
  return output(object, what, {DType::kF32}, {count}).as<float>();
}

CacheView OpCall::cache(nb::handle pages, const char* what, KvFormat format, int rows_per_block,
                        int row_elems, bool written) {
  const Borrowed& given = borrow(pages, what);
  if (written) refuse_read_only(given, what);
  const Tensor& view = given.view();
  if (rows_per_block < 1) {
    fail(ErrorCode::kInvalidArgument, what, ": ", rows_per_block,
         " rows a block, expected 1 or more");
  }
  const int64_t page = page_bytes(format, rows_per_block, row_elems);
  const int64_t elem = size_of(view.dtype);
  // Trailing dimensions must be one run of bytes; extents of 1 have no stride.
  int64_t run = 1;
  bool adjacent = view.rank >= 2;
  for (int i = view.rank - 1; i >= 1; --i) {
    adjacent = adjacent && (view.shape[i] == 1 || view.strides[i] == run);
    run *= view.shape[i];
  }
  if (!adjacent || run * elem < page) {
    fail(ErrorCode::kInvalidArgument, what, " is ", describe(view), adjacent ? "" : " with gaps",
         ", expected [num_blocks, ...] with ", page,
         " adjacent bytes or more a block: ", rows_per_block, " rows of ", kv_format_name(format));
  }
  const int64_t stride = view.shape[0] > 1 ? view.strides[0] * elem : run * elem;
  if (view.shape[0] > INT32_MAX || (view.shape[0] > 1 && stride < page)) {
    fail(ErrorCode::kInvalidArgument, what, " is ", describe(view), " with ", stride,
         " bytes from block to block, expected ", page, " or more");
  }
  return {.base = static_cast<std::byte*>(view.data),
          .block_stride_bytes = stride,
          .num_blocks = static_cast<int32_t>(view.shape[0]),
          .rows_per_block = rows_per_block,
          .format = format,
          .row_elems = row_elems};
}

BlockTable OpCall::block_table(nb::handle object, const char* what, int rows_per_block) {
  const ConstTensor table = input(object, what, {DType::kI32}, {kAny, kAny});
  return {.table = table.as<int32_t>(),
          .stride = table.strides[0],
          .columns = static_cast<int32_t>(table.shape[1]),
          .tokens_per_block = rows_per_block};
}

std::byte* OpCall::caller_scratch(int64_t bytes) {
  if (allocate_scratch_.is_none()) return nullptr;
  // What is not aligned is given up: the arena starts at a multiple of its alignment.
  const int64_t wanted = bytes + Arena::kAlignment;
  const Tensor given = output(allocate_scratch_(wanted), "scratch", {DType::kU8}, {kAny});
  if (given.shape[0] < wanted) {
    fail(ErrorCode::kInvalidArgument, "scratch has ", given.shape[0], " bytes, ", wanted,
         " were asked for");
  }
  const auto address = reinterpret_cast<uintptr_t>(given.data);
  return reinterpret_cast<std::byte*>(round_up(static_cast<int64_t>(address), Arena::kAlignment));
}

OpenDevice& OpCall::device() {
  DSV4_CHECK(!borrowed_.empty());
  return OpenDevice::get(borrowed_.front().device());
}

}  // namespace dsv4::python
