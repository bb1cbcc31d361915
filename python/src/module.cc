// dsv4._dsv4: the library as Python sees it. The package around it (python/dsv4) re-exports these
// names; only it is public.
#include "module.h"

#include "dsv4/error.h"

#ifndef DSV4_VERSION
#error "DSV4_VERSION is set by python/CMakeLists.txt"
#endif

namespace nb = nanobind;

namespace dsv4::python {
namespace {

PyObject* error_type = nullptr;
PyObject* code_type = nullptr;

void raise(ErrorCode code, const char* message) {
  try {
    nb::object error = nb::borrow(error_type)(message);
    error.attr("code") = nb::borrow(code_type)(static_cast<int>(code));
    PyErr_SetObject(error_type, error.ptr());
  } catch (nb::python_error& failure) {
    failure.restore();
  }
}

}  // namespace

void bind_errors(nb::module_& module) {
  nb::enum_<ErrorCode>(module, "ErrorCode", nb::is_arithmetic(),
                       "What the caller of a function that failed should do.")
      .value("INVALID_ARGUMENT", ErrorCode::kInvalidArgument, "Correct the call.")
      .value("NOT_FOUND", ErrorCode::kNotFound, "Provide the file, tensor or device.")
      .value("UNSUPPORTED", ErrorCode::kUnsupported,
             "Valid, but nothing here can do it; the message lists every unmet condition.")
      .value("OUT_OF_MEMORY", ErrorCode::kOutOfMemory, "Release some, or ask for less.")
      .value("DEVICE_ERROR", ErrorCode::kDeviceError, "The device or its driver failed.")
      .value("DATA_CORRUPT", ErrorCode::kDataCorrupt, "Get a good copy of the file.")
      .value("INTERNAL", ErrorCode::kInternal, "A fault of dsv4 itself: report it.");
  code_type = module.attr("ErrorCode").inc_ref().ptr();
  error_type = PyErr_NewExceptionWithDoc("dsv4.Error",
                                         "Every failure of dsv4. `code` is an ErrorCode; the "
                                         "message says what, expected, given, where.",
                                         PyExc_RuntimeError, nullptr);
  module.attr("Error") = nb::borrow(error_type);
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error.code(), error.what());
    }
  });
}

}  // namespace dsv4::python

NB_MODULE(_dsv4, module) {
  using namespace dsv4::python;
  module.attr("__version__") = DSV4_VERSION;
  bind_errors(module);
  bind_tensors(module);
  bind_model(module);
  bind_engine(module);
  bind_single_layer(module);
  nb::module_ ops = module.def_submodule("ops");
  bind_caches(ops);
  bind_attend(ops);
  bind_ops(ops);
}
