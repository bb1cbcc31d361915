// Memory of other libraries as views of dsv4, for the time of one call. Nothing is copied.
#pragma once
#include "casters.h"

#include <optional>

#include "dsv4/device.h"
#include "dsv4/tensor.h"

namespace dsv4::python {

namespace nb = nanobind;

/// Memory described by numbers (dsv4.RawTensor): for callers that know their pointers and streams,
/// such as dsv4.flash_mla.
struct RawTensor {
  Tensor view;
  DeviceId device;
  nb::object owner;  // kept alive with this, or none
};

/// A tensor argument: anything with __dlpack__, or a RawTensor. Holds what its owner gave until it
/// is destroyed (with the GIL held).
class Borrowed {
 public:
  /// @param what    name of the argument, for messages.
  /// @param stream  handle on which the memory will be used (CUDA, ROCm): the owner orders its own
  ///                work before it.
  /// @throws Error kInvalidArgument: no tensor, a dtype or rank that dsv4 has not, another device.
  Borrowed(nb::handle object, const char* what, void* stream);

  const Tensor& view() const { return view_; }
  const DeviceId& device() const { return device_; }
  bool read_only() const { return read_only_; }

 private:
  nb::object owner_;
  Tensor view_;
  DeviceId device_;
  bool read_only_ = false;
};

/// Whole bytes of each element are `dtype`'s: uint8 and int8 for FP8 and FP4, uint16 for bf16,
/// which numpy does not have.
bool same_bytes(DType given, DType wanted);

}  // namespace dsv4::python
