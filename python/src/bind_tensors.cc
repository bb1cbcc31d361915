// dsv4.RawTensor: memory by pointer, for callers that have no DLPack or no time for it.

#include <algorithm>

#include "borrowed.h"
#include "core/fail.h"
#include "module.h"

namespace dsv4::python {

using namespace nb::literals;

namespace {

DType dtype_named(const std::string& name) {
  for (DType dtype : {DType::kF32, DType::kBf16, DType::kF8E4M3, DType::kF8E8M0, DType::kF4E2M1,
                      DType::kI64, DType::kI32, DType::kU8}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail(ErrorCode::kInvalidArgument, "dtype \"", name,
       "\", expected f32, bf16, f8_e4m3, f8_e8m0, f4_e2m1, i64, i32 or u8");
}

}  // namespace

void bind_tensors(nb::module_& module) {
  nb::class_<RawTensor>(module, "RawTensor",
                        "Memory by address, accepted wherever an array is. Nothing is "
                        "checked, and no stream waits.\n\n"
                        "pointer  address of the first element\n"
                        "dtype    'bf16', 'f32', 'i32', 'i64', 'u8', 'f8_e4m3', 'f8_e8m0', "
                        "'f4_e2m1'\n"
                        "shape, strides  at most 4 numbers each, in elements\n"
                        "device   'cpu', 'cuda:N', 'rocm:N'\n"
                        "owner    object that is kept alive with this one")
      .def(
          "__init__",
          [](RawTensor* self, uintptr_t pointer, const std::string& dtype,
             const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
             const std::string& device, nb::object owner) {
            if (shape.size() > kMaxRank || shape.size() != strides.size()) {
              fail(ErrorCode::kInvalidArgument, "RawTensor of ", shape.size(), " extents and ",
                   strides.size(), " strides, expected as many, at most ", kMaxRank);
            }
            RawTensor out;
            out.view.data = reinterpret_cast<void*>(pointer);
            out.view.dtype = dtype_named(dtype);
            out.view.rank = static_cast<int>(shape.size());
            std::copy(shape.begin(), shape.end(), out.view.shape.begin());
            std::copy(strides.begin(), strides.end(), out.view.strides.begin());
            out.device = DeviceId::parse(device);
            out.owner = std::move(owner);
            new (self) RawTensor(std::move(out));
          },
          "pointer"_a, "dtype"_a, "shape"_a, "strides"_a, "device"_a, "owner"_a = nb::none())
      .def("__repr__", [](const RawTensor& self) {
        return "RawTensor(" + describe(self.view) + " on " + self.device.str() + ")";
      });
  module.def(
      "address_of",
      [](nb::handle array) {
        const Borrowed borrowed(array, "array", nullptr);
        return reinterpret_cast<uintptr_t>(borrowed.view().data);
      },
      "array"_a, "Address that operations see of an array: the array's own, nothing is copied.");
}

}  // namespace dsv4::python
