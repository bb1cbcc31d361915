#include "borrowed.h"

#include "core/fail.h"
#include "dlpack.h"

namespace dsv4::python {
namespace {

std::string type_name_of(nb::handle object) {
  return nb::cast<std::string>(nb::str(object.type().attr("__name__")));
}

std::optional<DType> dtype_of(const dlpack::DataType& type) {
  using dlpack::Code;
  if (type.code == Code::kF4E2M1fn && type.bits * type.lanes == 8) return DType::kF4E2M1;
  if (type.lanes != 1) return std::nullopt;
  switch (type.code) {
    case Code::kFloat:
      return type.bits == 32 ? std::optional(DType::kF32) : std::nullopt;
    case Code::kBfloat:
      return type.bits == 16 ? std::optional(DType::kBf16) : std::nullopt;
    case Code::kInt:
      if (type.bits == 64) return DType::kI64;
      if (type.bits == 32) return DType::kI32;
      return type.bits == 8 ? std::optional(DType::kU8) : std::nullopt;
    case Code::kUInt:
      if (type.bits == 16) return DType::kBf16;
      return type.bits == 8 ? std::optional(DType::kU8) : std::nullopt;
    case Code::kF8E4M3fn:
      return DType::kF8E4M3;
    case Code::kF8E8M0fnu:
      return DType::kF8E8M0;
    default:
      return std::nullopt;
  }
}

DeviceId device_of(const dlpack::Device& device, const char* what) {
  using dlpack::DeviceType;
  switch (device.type) {
    case DeviceType::kCpu:
    case DeviceType::kCudaHost:
    case DeviceType::kRocmHost:
      return {Platform::kCpu, 0};
    case DeviceType::kCuda:
    case DeviceType::kCudaManaged:
      return {Platform::kCuda, device.index};
    case DeviceType::kRocm:
      return {Platform::kRocm, device.index};
  }
  fail(ErrorCode::kInvalidArgument, what, ": DLPack device type ", static_cast<int>(device.type),
       ", expected CPU, CUDA or ROCm");
}

// Calls __dlpack__ with what its owner takes: `max_version` is newer than many of them, and numpy
// wants no stream.
nb::object ask_for_capsule(nb::handle object, bool on_gpu, void* stream) {
  nb::object method = object.attr("__dlpack__");
  nb::dict keywords;
  if (on_gpu) {
    // 1 stands for the default stream, whose handle is 0.
    const auto handle = reinterpret_cast<intptr_t>(stream);
    keywords["stream"] = nb::int_(handle == 0 ? intptr_t{1} : handle);
  }
  nb::dict newest(keywords);
  newest["max_version"] = nb::make_tuple(dlpack::kMajorVersion, 1);
  try {
    return method(**newest);
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method(**keywords);
}

}  // namespace

Borrowed::Borrowed(nb::handle object, const char* what, void* stream) {
  RawTensor* raw = nullptr;
  if (nb::try_cast(object, raw) && raw != nullptr) {
    owner_ = nb::borrow(object);
    view_ = raw->view;
    device_ = raw->device;
    return;
  }
  if (!nb::hasattr(object, "__dlpack__") || !nb::hasattr(object, "__dlpack_device__")) {
    fail(ErrorCode::kInvalidArgument, what, " is of type ", type_name_of(object),
         ", expected an array with __dlpack__ (numpy, torch, cupy, jax, ...)");
  }
  const auto place = nb::cast<std::pair<int, int>>(object.attr("__dlpack_device__")());
  device_ = device_of({static_cast<dlpack::DeviceType>(place.first), place.second}, what);
  owner_ = ask_for_capsule(object, device_.platform != Platform::kCpu, stream);

  // The capsule is not consumed: its destructor gives the memory back.
  const dlpack::TensorView* given = nullptr;
  if (PyCapsule_IsValid(owner_.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<dlpack::ManagedVersioned*>(
        PyCapsule_GetPointer(owner_.ptr(), "dltensor_versioned"));
    if (managed->version.major != dlpack::kMajorVersion) {
      fail(ErrorCode::kUnsupported, what, ": DLPack version ", managed->version.major, ".",
           managed->version.minor, ", expected ", dlpack::kMajorVersion, ".x");
    }
    read_only_ = (managed->flags & dlpack::kReadOnlyFlag) != 0;
    given = &managed->tensor;
  } else if (PyCapsule_IsValid(owner_.ptr(), "dltensor")) {
    given = &static_cast<dlpack::Managed*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"))->tensor;
  } else {
    fail(ErrorCode::kInvalidArgument, what, ": __dlpack__ returned no DLPack capsule");
  }

  const std::optional<DType> dtype = dtype_of(given->dtype);
  if (!dtype) {
    fail(ErrorCode::kInvalidArgument, what, ": DLPack dtype code ",
         static_cast<int>(given->dtype.code), " of ", int{given->dtype.bits}, " bits x ",
         given->dtype.lanes,
         ", expected float32, bfloat16 (or its bits as uint16), float8_e4m3fn, float8_e8m0fnu, "
         "int64, int32, int8 or uint8");
  }
  if (given->rank > kMaxRank) {
    fail(ErrorCode::kInvalidArgument, what, " has ", given->rank, " dimensions, expected at most ",
         kMaxRank);
  }
  view_.data = static_cast<char*>(given->data) + given->byte_offset;
  view_.dtype = *dtype;
  view_.rank = given->rank;
  int64_t stride = 1;
  for (int i = given->rank - 1; i >= 0; --i) {
    view_.shape[i] = given->shape[i];
    view_.strides[i] = given->strides == nullptr ? stride : given->strides[i];
    stride *= given->shape[i];
  }
}

bool same_bytes(DType given, DType wanted) {
  return given == wanted || (given == DType::kU8 && size_of(wanted) == 1);
}

}  // namespace dsv4::python
